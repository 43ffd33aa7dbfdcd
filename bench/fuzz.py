"""Fuzz load, inspect and apply with bent golden files: nothing but `ArtifactError` may come out.

    python -m bench.fuzz --seconds 60            # goes on where the last run of this seed stopped
    python -m bench.fuzz --replay 123            # one input again, with its traceback
    python -m bench.fuzz_guided --seconds 600    # guided by coverage; needs: pip install atheris

An input is bent in a few places and its checksums are mended (`tests/artifact/mutations.py`); it is loaded, and what
loads is inspected and put on a base of zeros: each is one execution. Memory is bounded by `RLIMIT_AS`, time by a CPU
timer; a crash of the interpreter is noticed by the parent, which goes on behind it. Counts add up in runs/fuzz/.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch
from rich.console import Console

from dtrain import ArtifactError, BaseMismatchError, Delta, Weights
from dtrain.artifact import Content, pack_file, unpack_file
from dtrain.cli.outcome import describe, report_lines, tensor_table
from dtrain.runtime import zero_base
from dtrain.weights import digest, tensor_bytes
from tests.artifact import mutations, reference_decoder
from tests.methods.settings import module_of

FOLDER = Path("runs/fuzz")
MEMORY = 1 << 30  # bytes beyond what the interpreter has taken when it starts
SECONDS = 5.0  # of CPU time, for one input
CHECKSUMS = ("header", "size", "checksum")


class Tally:
    """Executions, how far they came, what was refused and what was found, by target; kept in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        known = json.loads(path.read_text()) if path.exists() else {}
        self.index: int = known.get("next", 0)
        self.seconds: float = known.get("seconds", 0.0)
        self.runs = Counter[str](known.get("executions", {}))
        self.past: int = known.get("past_the_checksums", 0)
        self.kinds = {name: Counter[str](found) for name, found in known.get("refused", {}).items()}
        self.findings: list[dict[str, Any]] = known.get("findings", [])

    def save(self) -> None:
        FOLDER.mkdir(parents=True, exist_ok=True)
        refused = {name: dict(found.most_common()) for name, found in sorted(self.kinds.items())}
        share = self.past / max(1, self.runs["load"])
        text = json.dumps(
            {
                "next": self.index,
                "seconds": round(self.seconds, 1),
                "executions": dict(self.runs),
                "past_the_checksums": self.past,
                "share_past_the_checksums": round(share, 4),
                "refused": refused,
                "findings": self.findings,
            },
            indent=1,
        )
        temporary = self.path.with_suffix(".part")
        temporary.write_text(text)
        temporary.replace(self.path)

    def refuse(self, target: str, error: Exception) -> None:
        self.kinds.setdefault(target, Counter())[_kind(error)] += 1

    def find(self, index: int | str, target: str, error: str) -> None:
        self.findings.append({"input": index, "target": target, "error": error[:400]})
        print(f"input {index}, {target}: {error}", file=sys.stderr, flush=True)


def _kind(error: Exception) -> str:
    """Return which check refused a file, without what hangs on the file: numbers, names and shapes."""
    if not isinstance(error, ArtifactError):
        return type(error).__name__
    detail = str(error).split(f"{error.check}: ", 1)[-1].split(". ")[0]
    words = (word for word in detail.split() if word.strip("`.,:;()[]'\"").isalpha())
    return f"{error.check}: {' '.join(words)}"[:80]


def run(data: bytes, family: bytes | None, rng: Random, tally: Tally) -> str:
    """Load one file, then inspect and apply it; return the target that raised what it may not, by raising it."""
    tally.runs["load"] += 1
    try:
        content = unpack_file(bytearray(data), "input")
    except ArtifactError as error:
        tally.refuse("load", error)
        first = error.check == "format version" and "this dtrain reads" in str(error)
        tally.past += not (first or error.check in CHECKSUMS or "checksum" in str(error))
        return ""
    tally.past += 1
    for target, attempt in (("inspect", inspect), ("apply", apply)):
        tally.runs[target] += 1
        try:
            attempt(content, family, rng)
        except (ArtifactError, BaseMismatchError) as error:
            tally.refuse(target, error)
        except BaseException as error:
            error.add_note(target)
            raise
    return ""


def open_delta(content: Content, family: bytes | None) -> Delta:
    shared = unpack_file(bytearray(family), "family") if content.shared and family else None
    return Delta(content, "input", shared)


def inspect(content: Content, family: bytes | None, rng: Random) -> None:
    """What `dtrain inspect` does, its rows and its tables at times only: they take the most."""
    delta = open_delta(content, family)
    report = delta.report()
    if rng.random() < 0.2:
        rows, table = tensor_table(content.records)
        json.dumps([report.as_dict(), rows, report.notes(), describe(content.metadata)], allow_nan=False)
    if rng.random() < 0.01:
        _, table = tensor_table(content.records)
        console = Console(file=io.StringIO(), width=120)
        for part in (*report_lines(report), table, *describe(content.metadata)):
            console.print(part, markup=False, highlight=False)
        shown = console.file.getvalue() + str(report) + repr(delta)
        if any(ord(char) < 32 and char != "\n" for char in shown):
            raise RuntimeError(f"a control character is shown: {shown!r}")
    if rng.random() < 0.05:
        written = b"".join(pack_file(content))
        if b"".join(pack_file(unpack_file(bytearray(written)))) != written:
            raise RuntimeError("written and read again, it is another file")


def apply(content: Content, family: bytes | None, rng: Random) -> None:
    """Put the delta on zeros, where that is small: as a state dict, and at times on a module, and off again."""
    delta = open_delta(content, family)
    size = sum(_bytes(record) for record in content.records)
    base = zero_base(content, "input") if size <= 16 * mutations.SMALL else Weights({"w": torch.zeros(2)})
    state = delta.state_dict(base)
    if rng.random() < 0.02:
        _module(delta, base, state)
    if rng.random() < 0.01 and not content.shared:
        _second_opinion(content, base, state)


def _bytes(record: Any) -> int:
    size = record.dtype.itemsize
    for side in record.shape:
        size *= max(side, 1)
    return size


def _module(delta: Delta, base: Weights, state: dict[str, torch.Tensor]) -> None:
    records = delta.content.records
    plain = all(r.dtype == torch.float32 and _named(r.name) and r.role.name in ("ADD", "SAME", "DROP") for r in records)
    if not records or not plain:
        return
    module = module_of({name: torch.zeros(value.shape) for name, value in base.tensors.items()})
    before = _digests(module.state_dict())
    delta.apply_(module)
    if _digests(module.state_dict()) != _digests(state):
        raise RuntimeError("apply_ and state_dict differ")
    delta.remove_(module)
    if _digests(module.state_dict()) != before:
        raise RuntimeError("remove_ did not restore the base")


def _digests(state: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: digest(value) for name, value in state.items()}


def _named(name: str) -> bool:
    """Return whether a module can have a tensor of this name: every part is a word, and none is one of its methods."""
    return all(part.isidentifier() and not hasattr(torch.nn.Module, part) for part in name.split("."))


def _second_opinion(content: Content, base: Weights, state: dict[str, torch.Tensor]) -> None:
    """Compare with the reference decoder, which reads the very file."""
    file = reference_decoder.parse(b"".join(pack_file(content)))
    for name, record in file.records.items():
        old, new = (None if tensor is None else tensor_bytes(tensor).numpy().tobytes() for tensor in (
            base.get(name), state.get(name)))  # fmt: skip
        if not reference_decoder.agrees(record, old, new):
            raise RuntimeError(f"{name!r} differs from the reference decoder")


def limit() -> None:
    """Bound memory for the rest of this process; time is bounded input by input."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s of CPU time")

    signal.signal(signal.SIGVTALRM, late)


def once(seed: int, index: int, tally: Tally) -> None:
    """Run one input; a finding is written down."""
    rng = mutations.seeded(seed, index)
    _, data, family = mutations.case(rng)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        run(data, family, rng, tally)
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        target = getattr(error, "__notes__", ["load"])[0]
        tally.find(index, target, f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def work(seed: int, seconds: float, tally: Tally, place: mmap.mmap) -> None:
    """Run inputs until the time is over; `place` always holds the number of the one that runs."""
    limit()
    start, parent = time.monotonic(), os.getppid()
    saved = start
    while (now := time.monotonic()) - start < seconds and os.getppid() == parent:
        for _ in range(50):
            place[:8] = tally.index.to_bytes(8, "little")
            once(seed, tally.index, tally)
            tally.index += 1
        if now - saved > 10:
            tally.seconds += now - saved
            saved = now
            tally.save()
    tally.seconds += time.monotonic() - saved
    tally.save()


def supervise(seed: int, seconds: float, path: Path) -> Tally:
    """Fork a worker, and another one behind the input that killed it."""
    place, end = mmap.mmap(-1, 8), time.monotonic() + seconds
    while True:
        tally = Tally(path)
        left = end - time.monotonic()
        if left <= 0:
            return tally
        if not (child := os.fork()):
            work(seed, left, tally, place)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            tally = Tally(path)
            tally.index = int.from_bytes(place[:8], "little")
            tally.find(tally.index, "process", f"it ended with status {status}")
            tally.index += 1
            tally.save()


class Bytes(Random):
    """A generator whose draws are the bytes that a fuzzer guided by coverage chooses."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self.data, self.at = data, 0

    def getrandbits(self, k: int) -> int:
        size = -(-k // 8)
        piece, self.at = self.data[self.at : self.at + size], self.at + size
        return int.from_bytes(piece.ljust(size, b"\0"), "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(24) / (1 << 24)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    path = FOLDER / f"seed_{given.seed}.json"
    if given.replay is not None:
        rng = mutations.seeded(given.seed, given.replay)
        _, data, family = mutations.case(rng)
        (FOLDER / f"input_{given.replay}.safetensors").write_bytes(data)
        run(data, family, rng, Tally(FOLDER / "none.json"))
    else:
        tally = supervise(given.seed, given.seconds, path)
        print(path.read_text())
        sys.exit(bool(tally.findings))


if __name__ == "__main__":
    main()
