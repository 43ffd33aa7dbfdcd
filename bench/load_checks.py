"""What the checks of a file cost when it is loaded: `python -m bench.load_checks [--layers 12]`.

The same file is loaded with checks and without: without them nothing is hashed and nothing of the manifest is
validated, but the same bytes are read and the same objects made of them. The library has no such option: it is patched
in here. Every load is a process of its own; the two take turns, and the least time and memory of several are shown.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import torch

import dtrain
from bench.memory import reset_peak, resident
from dtrain.artifact import Role, file, manifest
from dtrain.stages import Pipeline

#: An encoder's delta at a rate of thousands, at one of tens, and hardly compressed at all.
METHODS: tuple[dtrain.Method, ...] = (dtrain.SeededSign(keep=1 / 32), dtrain.Dare(keep=0.1), dtrain.Dare(keep=0.9))


def model(layers: int, width: int = 768) -> dict[str, torch.Tensor]:
    """Return the layers of an encoder, of 7 million parameters each, named as Hugging Face does."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i in range(layers):
        parts = {f"attention.{part}": (width, width) for part in ("query", "key", "value", "output")}
        parts |= {"intermediate": (4 * width, width), "output": (width, 4 * width)}
        for part, shape in parts.items():
            shapes[f"encoder.layer.{i}.{part}.weight"] = shape
            shapes[f"encoder.layer.{i}.{part}.bias"] = shape[:1]
        shapes |= {f"encoder.layer.{i}.{place}.LayerNorm.weight": (width,) for place in ("attention", "output")}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Anything:
    """In the place of a digest: equal to everything."""

    def __ne__(self, _: object) -> bool:
        return False


def read_rest(source: BinaryIO, raw: bytearray, total: int) -> Anything:
    """Read as `dtrain.artifact.file` does, and hash nothing."""
    while len(raw) <= total and (more := source.read(min(file._PIECE, total + 1 - len(raw)))):
        raw += more
    return Anything()


def without_checks() -> None:
    """Take every digest and every validation out of this process."""
    file._read_rest = read_rest  # type: ignore[assignment]
    manifest.check_size = lambda *_: None
    manifest._read_kind = read_kind
    Pipeline.__post_init__ = lambda _: None  # type: ignore[method-assign]


def read_kind(cursor: Any, pipelines: list[Pipeline]) -> Any:
    """Read as `dtrain.artifact.manifest` does, and believe all of it."""
    role, dtype = cursor.take(2)
    shape = tuple(cursor.sequence(cursor.varint))
    return Role(role), manifest.DTYPES[dtype], shape, tuple(cursor.sequence(lambda: cursor.choose(pipelines)))


def once(path: Path, checks: bool) -> dict[str, float]:
    """Load the file in this process; return seconds, and MiB at the peak beyond those before."""
    load = dtrain.load  # what is imported lazily is imported now
    if not checks:
        without_checks()
    reset_peak()  # imports have had a higher one
    before = resident("VmHWM")
    start, cpu = time.perf_counter(), time.process_time()
    delta = load(path)
    found = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    found["mebibytes"] = (resident("VmHWM") - before) / 2**20
    return found | {"tensors": len(delta.content.records)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("bench/results/load_checks.json"))
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.once:
        print(json.dumps(once(Path(given.once[0]), given.once[1] == "on")))
        return
    torch.manual_seed(0)
    base, rows = model(given.layers), []
    tuned = {name: value + 0.01 * torch.randn(value.shape) for name, value in base.items()}
    with TemporaryDirectory() as folder:
        for method in METHODS:
            path = Path(folder) / "delta"
            dtrain.compress(base, tuned, method).save(path)
            rows.append({"method": repr(method), **compare(path, given.repeats)})
            print(json.dumps(rows[-1]), flush=True)
    given.json.write_text(json.dumps(rows, indent=1) + "\n")


def compare(path: Path, repeats: int) -> dict[str, Any]:
    found: dict[str, list[dict[str, float]]] = {"on": [], "off": []}
    for _ in range(repeats):
        for checks, runs in found.items():
            command = [sys.executable, "-m", "bench.load_checks", "--once", str(path), checks]
            runs.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    row: dict[str, Any] = {"bytes": path.stat().st_size, "tensors": found["on"][0]["tensors"], "repeats": repeats}
    for what in ("seconds", "cpu", "mebibytes"):
        on, off = ([run[what] for run in found[checks]] for checks in ("on", "off"))
        row[what] = {"on": min(on), "off": min(off), "ratio": round(min(on) / min(off), 3)}
        row[what]["median ratio"] = round(median(on) / median(off), 3)
    return row


if __name__ == "__main__":
    main()
