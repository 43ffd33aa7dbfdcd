"""Cut every golden file at every byte and flip every bit of it: `python -m bench.damage [--json PATH]`.

What is damaged is refused, or makes the very same tensors; the table says how often which check noticed.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from dtrain import ArtifactError
from dtrain.artifact import file, pack_file, unpack_file

GOLDEN = Path("tests/artifact/golden/v1")


def outcomes(raw: bytes, damaged: Iterator[bytearray]) -> Counter[str]:
    """Count by which check each is refused, or that it is harmless, or (which must not be) another file."""
    found = Counter[str]()
    for data in damaged:
        try:
            content = unpack_file(data)
        except ArtifactError as error:
            found[error.check] += 1
        else:
            found["harmless" if b"".join(pack_file(content)) == raw else "UNDETECTED"] += 1
    return found


def cut(raw: bytes) -> Iterator[bytearray]:
    return (bytearray(raw[:size]) for size in range(len(raw)))


def flipped(raw: bytes) -> Iterator[bytearray]:
    for at in range(8 * len(raw)):
        data = bytearray(raw)
        data[at // 8] ^= 1 << at % 8
        yield data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("bench/results/damage.json"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    file.find_damage = lambda *_: None  # which tensor it is takes ten times as long as to see it
    start, rows, table = time.process_time(), {}, Table("golden file", "bytes", "cut", "flipped", "undetected")
    for path in sorted(GOLDEN.glob("*.safetensors")):
        raw = path.read_bytes()
        found = {"cut": outcomes(raw, cut(raw)), "flipped": outcomes(raw, flipped(raw))}
        rows[path.stem] = {"bytes": len(raw), **{name: dict(count) for name, count in found.items()}}
        shown = [
            f"{count.total():,}: " + ", ".join(f"{k} {v:,}" for k, v in count.most_common()) for count in found.values()
        ]
        table.add_row(path.stem, f"{len(raw):,}", *shown, str(sum(count["UNDETECTED"] for count in found.values())))
    Console(width=160).print(table)
    rows["seconds of CPU time"] = round(time.process_time() - start, 1)
    given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
