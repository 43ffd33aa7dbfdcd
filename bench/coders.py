"""What coders make of the symbols of a real delta: entropy, packed bits, Zstandard, rANS.

    python -m bench.coders --shared ../shared

Every matrix of a MiniLM fine-tuned on SST-2 is quantised in the ways that methods use, its symbols are coded by each
code stage. The entropy is that of single symbols, per tensor, without any table. Prints one table and writes its rows.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import dtrain
from bench.record import write_json
from bench.tasks import sst2
from dtrain.stages import Affine, DeadZone, Float16, Groups, Packed, Rans, Sign, Uniform, Zstd
from dtrain.stages.code import Code
from dtrain.stages.quantise import Blocks

Quantised = tuple[Tensor, int]  # symbols, and the bits each takes unpacked
Quantiser = Callable[[str, Tensor], Quantised]
CODES: dict[str, Code] = {"packed": Packed(), "zstd": Zstd(), "rANS": Rans()}


def symbols(quantise: Any, values: Tensor) -> Quantised:
    return quantise.encode(values.reshape(-1), Blocks(None, 1)).symbols, quantise.bits


def grouped(name: str, delta: Tensor) -> Quantised:
    kept = delta.reshape(-1)[Groups(8, 1, 0).positions(name, (delta.shape[0], delta[0].numel()))]
    return symbols(Affine(4), kept)


def dead_zone(step: float) -> Quantiser:
    """Return a dead-zone quantiser whose step is a multiple of the tensor's standard deviation."""
    return lambda _, delta: symbols(DeadZone(0.6, 127), delta / (step * delta.std()))


WAYS: dict[str, Quantiser] = {
    "signs of all (BitDelta)": lambda _, delta: symbols(Sign(), delta),
    "4 bits, symmetric, all": lambda _, delta: symbols(Uniform(4), delta),
    "8 bits, symmetric, all": lambda _, delta: symbols(Uniform(8), delta),
    "4 bits, asymmetric, 1 in 8 (DeltaDQ)": grouped,
    "dead zone, step 1 sd (Ecsq)": dead_zone(1.0),
    "dead zone, step 3 sd (Ecsq)": dead_zone(3.0),
    "half precision, bytes (Dare)": lambda _, delta: symbols(Float16(), delta),
}


def measure(deltas: dict[str, Tensor]) -> list[dict[str, Any]]:
    rows = []
    for way, quantise in WAYS.items():
        row: dict[str, Any] = {"way": way, "symbols": 0, "entropy": 0.0, "worst": 0.0}
        row |= dict.fromkeys(CODES, 0) | {f"{name} seconds": 0.0 for name in CODES}
        for name, delta in deltas.items():
            found, bits = quantise(name, delta)
            entropy = entropy_bytes(found)
            row["symbols"] += found.numel()
            row["entropy"] += entropy
            for label, code in CODES.items():
                start = time.process_time()
                size = code.encode(found, bits).numel()
                row[f"{label} seconds"] += time.process_time() - start
                row[label] += size
                if label == "rANS" and size >= 1 << 16:
                    row["worst"] = max(row["worst"], size / entropy - 1)
        rows.append(row)
        sys.stderr.write(f"{row}\n")
    return rows


def entropy_bytes(found: Tensor) -> float:
    counts = torch.bincount(found.reshape(-1).long()).double()
    used = counts[counts > 0]
    return float(-(used * (used / used.sum()).log2()).sum()) / 8


def table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="Bytes of all symbols; ratio to the entropy; megasymbols per processor second")
    for header in ("symbols of", "count", "entropy", *CODES, "rANS, worst payload of 64 KiB or more"):
        view.add_column(header, justify="left" if header == "symbols of" else "right")
    for row in rows:
        coded = [
            f"{row[name]:,} ({row[name] / row['entropy']:.4f}) {row['symbols'] / row[f'{name} seconds'] / 1e6:.0f} M/s"
            for name in CODES
        ]
        worst = f"+{row['worst']:.3%}" if row["worst"] else "-"
        view.add_row(row["way"], f"{row['symbols']:,}", f"{row['entropy']:,.0f}", *coded, worst)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with models/ and data/")
    parser.add_argument("--out", type=Path, default=Path("bench/results/coders.json"))
    arguments = parser.parse_args()
    task, rules = sst2(arguments.shared, 0), dtrain.Rules(embeddings=())
    chosen = [n for n, tensor in task.tuned.items() if rules.role(n, tensor.shape, tensor.dtype) == "method"]
    deltas = {name: task.tuned[name] - task.base[name] for name in chosen}
    rows = measure({name: delta for name, delta in deltas.items() if delta.any()})
    write_json(arguments.out, rows)
    Console(width=170).print(table(rows))


if __name__ == "__main__":
    main()
