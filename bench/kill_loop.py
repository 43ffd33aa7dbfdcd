"""Kill writers at random times, and count the files that are neither the old nor the new.

Run with `python -m bench.kill_loop [--kills 1000] [--out bench/results/kill_loop.json]`. A process writes two versions
of a file of 3 MB to one path in turn, without end. It is killed with SIGKILL after a time drawn from zero to three
times what one write takes, and the file is loaded: it must be one of the two versions, whole. Where it is not, one is
put back before the next process begins. The system stays up, so what a power cut would do is not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import dtrain
from dtrain.artifact.atomic import write_atomic
from dtrain.progress import progress

BYTES = 3_000_000


@dataclass(frozen=True)
class Writer:
    """How a version is written and read back: `read` returns the tensor that tells the versions apart."""

    suffix: str
    versions: Sequence[Any]
    save: Callable[[Any, Path], object]
    read: Callable[[Path], Tensor]


@dataclass(frozen=True)
class Row:
    """What came of one writer. `damaged`: the load failed; `mixed`: it did not, and the tensor is of no version."""

    kills: int
    damaged: int
    mixed: int
    temporaries: int
    file_bytes: int
    write_ms: float


def writers() -> dict[str, Writer]:
    torch.manual_seed(0)
    zeros, method = {"w": torch.zeros(BYTES // 2000, 1000)}, dtrain.Dare(keep=1)  # half precision: two bytes an element
    deltas = [dtrain.compress(zeros, {"w": torch.randn(BYTES // 2000, 1000)}, method) for _ in (0, 1)]
    states = [{"w": torch.randn(BYTES // 4)} for _ in (0, 1)]

    def payload(path: Path) -> Tensor:
        return dtrain.load(path).content.records[0].payloads[0].data

    return {
        "dtrain Delta.save": Writer(".safetensors", deltas, lambda delta, path: delta.save(path), payload),
        "torch.save": Writer(".pt", states, torch.save, lambda path: torch.load(path, weights_only=True)["w"]),
        "safetensors save_file": Writer(".safetensors", states, save_file, lambda path: load_file(path)["w"]),
    }


def kill_loop(writer: Writer, path: Path, kills: int, advance: Callable[[str], None]) -> Row:
    rng, times, whole = random.Random(0), list[float](), list[Tensor]()  # noqa: S311  # no secret depends on it
    for _ in range(10):
        for state in writer.versions:
            start = time.perf_counter()
            writer.save(state, path)
            times.append(time.perf_counter() - start)
            whole = [*whole[-1:], writer.read(path).clone()]
    size, typical = path.stat().st_size, statistics.median(times)
    damaged = mixed = temporaries = 0
    for _ in range(kills):
        kill(start_writing(writer, path), after=rng.uniform(0, 3 * typical))
        try:
            found = writer.read(path)
            good = any(torch.equal(found, one) for one in whole)
            mixed += not good
            del found  # it may be mapped: the file is written over before the next kill
        except Exception:  # whatever a broken file makes a reader raise
            good = False
            damaged += 1
        if not good:
            path.unlink(missing_ok=True)
            writer.save(writer.versions[0], path)
        for other in path.parent.iterdir():
            if other != path:
                temporaries += 1
                other.unlink()
        advance(f"{damaged + mixed} corrupt")
    return Row(kills, damaged, mixed, temporaries, size, round(1000 * typical, 2))


def start_writing(writer: Writer, path: Path) -> int:
    """Start a process that writes without end, and return its number once it runs."""
    ready, told = os.pipe()
    child = os.fork()
    if child:
        os.close(told)
        os.read(ready, 1)
        os.close(ready)
        return child
    try:
        os.write(told, b".")
        while True:
            for state in writer.versions:
                writer.save(state, path)
    finally:
        os._exit(70)


def kill(child: int, after: float) -> None:
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
        raise RuntimeError("the writer ended by itself before it was killed")


def report(rows: dict[str, Row]) -> None:
    table = Table()
    for header in ("", "kills", "load fails", "loads, but mixed", "temporaries left", "bytes", "ms a write"):
        table.add_column(header, justify="right" if header else "left")
    for name, row in rows.items():
        table.add_row(name, *(f"{value:,}" for value in asdict(row).values()))
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)  # a process that is forked inherits no threads
    machine = {"system": platform.system(), "cores": os.cpu_count(), "python": platform.python_version()}
    packages = {name: version(name) for name in ("dtrain", "torch", "safetensors")}
    rows: dict[str, Row] = {}
    for name, writer in writers().items():
        with tempfile.TemporaryDirectory() as folder, progress(name, args.kills) as advance:
            rows[name] = kill_loop(writer, Path(folder) / f"file{writer.suffix}", args.kills, advance)
        if args.out:  # an hour's work must not be lost with the next writer
            found = {"machine": machine, "packages": packages, "writers": {n: asdict(row) for n, row in rows.items()}}
            write_atomic(args.out, [(json.dumps(found, indent=1) + "\n").encode()])
    report(rows)


if __name__ == "__main__":
    main()
