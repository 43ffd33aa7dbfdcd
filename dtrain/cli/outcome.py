"""What a command found, for programs and for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from dtrain.artifact import Record
from dtrain.methods.catalogue import Entry, shown
from dtrain.report import Report, visible

_WIDTH = 120  # where the output is no terminal, whose width would be known


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Args:
        data: For programs: JSON-serialisable, without NaN.
        shown: For people: lines and tables, from top to bottom.
    """

    data: dict[str, Any]
    shown: Sequence[RenderableType]

    def show(self) -> None:
        """Print it to standard output."""
        console = Console()
        if not console.is_terminal:
            console = Console(width=_WIDTH)
        for part in self.shown:
            # Names and paths are printed as they are: brackets in them are no markup, and a long line is not broken.
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))


def report_lines(report: Report) -> list[RenderableType]:
    """Return the report of a delta, as `print(delta.report())` shows it."""
    return [report.table(), *report.notes()]


def describe(metadata: Mapping[str, Any]) -> list[str]:
    """Return a line for every piece of provenance that the report does not show: rules, fit, training."""
    return [f"{key}: {json.dumps(value)}" for key, value in metadata.items() if key not in ("method", "nominal_bits")]


def tensor_table(records: Sequence[Record]) -> tuple[list[dict[str, Any]], Table]:
    """Return one row per tensor, for programs and for people."""
    rows = [_tensor(record) for record in records]
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    for header in ("role", "dtype", "shape"):
        table.add_column(header)
    table.add_column("bytes", justify="right")
    table.add_column("scale", justify="right")
    for row in rows:
        shape = " x ".join(map(str, row["shape"])) or "scalar"
        scales = " ".join(f"{scale:.4g}" for scale in row["scales"])
        table.add_row(visible(row["name"]), row["role"], row["dtype"], shape, f"{row['payload_bytes']:,}", scales)
    return rows, table


def method_table(entries: Sequence[Entry]) -> Table:
    """Return a table of all methods."""
    table = Table(
        caption="With default arguments. Bits are per compressed weight: nominal as the paper counts them, on disk as\n"
        "the payload of a Gaussian delta of 768 x 768. All arguments: dtrain compress --method.help NAME",
        caption_justify="left",
    )
    for header in ("method", "data needed"):
        table.add_column(header, no_wrap=True)
    for header in ("nominal bits", "on disk"):
        table.add_column(header, justify="right")
    table.add_column("what it does")
    table.add_column("source")
    for entry in entries:
        bits = (shown(entry.nominal_bits), shown(entry.true_bits))
        table.add_row(entry.name, entry.needs, *bits, entry.summary, entry.source)
    return table


def _tensor(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "role": record.role.name.lower(),
        "dtype": str(record.dtype).removeprefix("torch."),
        "shape": list(record.shape),
        "payload_bytes": record.payload_bytes,
        "scales": [payload.scale for payload in record.payloads],
    }
