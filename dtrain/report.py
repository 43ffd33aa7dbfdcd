"""What a delta costs: bytes by kind of tensor, counted on the file."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.console import Console
from rich.table import Table

from dtrain.artifact import Content, Record, Role
from dtrain.stages import HALF, kept_values

_KINDS = {
    "method": "compressed by the method",
    "half": "full delta in half precision",
    "whole": "stored whole: new, or a head by its name",
    "bits": "bit for bit",
    "same": "unchanged",
    "drop": "left at the base by a rule",
}


@dataclass(frozen=True)
class Row:
    """One kind of tensor: how many tensors, elements, elements kept and payload bytes."""

    kind: str
    tensors: int
    elements: int
    kept: int
    payload_bytes: int


@dataclass(frozen=True)
class Report:
    """The size of a delta, every byte counted.

    Args:
        method: Name and parameters of the method, and what was fitted.
        tensors: Tensors of the fine-tuned model.
        elements: Their elements, tied ones once.
        checkpoint_bytes: Bytes of the fine-tuned checkpoint in its own dtypes.
        file_bytes: Bytes of the delta file.
        nominal_bits: Bits per compressed parameter by the paper's accounting, or None.
        rows: Bytes by kind of tensor.
        whole: Names of tensors the base does not have.
        base_only: Names of tensors that only the base has.
        shared: SHA-256 of the family's shared file, without which this one is of no use; empty where there is none.
        shared_bytes: Bytes of that file. They are no part of `file_bytes`: a family stores them once.
    """

    method: dict[str, Any]
    tensors: int
    elements: int
    checkpoint_bytes: int
    file_bytes: int
    nominal_bits: float | None
    rows: tuple[Row, ...]
    whole: tuple[str, ...]
    base_only: tuple[str, ...]
    shared: str = ""
    shared_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tuned checkpoint / bytes of the delta file. Nothing else is ever called a ratio."""
        return self.checkpoint_bytes / self.file_bytes

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the file per element of the whole model."""
        return 8 * self.file_bytes / max(self.elements, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        return {**asdict(self), "ratio": self.ratio, "bits_per_parameter": self.bits_per_parameter}

    def notes(self) -> list[str]:
        """Return what the table does not show: a shared file, tensors stored whole or left out."""
        shared = f"needs the shared file of {self.shared_bytes:,} bytes, SHA-256 {self.shared}, not counted here"
        lines = [shared] if self.shared else []
        lines += [f"stored whole: {', '.join(self.whole)}"] if self.whole else []
        return lines + ([f"in the base only, left out: {', '.join(self.base_only)}"] if self.base_only else [])

    def table(self) -> Table:
        """Return a rich table."""
        overhead = self.file_bytes - sum(row.payload_bytes for row in self.rows)
        table = Table(title=_call(self.method), title_justify="left", show_footer=True)
        table.add_column("tensors", footer="file")
        table.add_column("count", justify="right", footer=f"{self.tensors:,}")
        table.add_column("elements", justify="right", footer=f"{self.elements:,}")
        table.add_column("kept", justify="right")
        table.add_column("bytes", justify="right", footer=f"{self.file_bytes:,}")
        for row in self.rows:
            share = f"{row.kept / row.elements:.4%}" if row.elements else "-"
            table.add_row(_KINDS[row.kind], f"{row.tensors:,}", f"{row.elements:,}", share, f"{row.payload_bytes:,}")
        table.add_row("manifest: names, digests, scales", "", "", "", f"{overhead:,}")
        nominal = "" if self.nominal_bits is None else f"; nominal {self.nominal_bits:.4g} bit per compressed weight"
        table.caption_justify = "left"
        table.caption = (
            f"{self.ratio:,.1f}x smaller than the checkpoint of {self.checkpoint_bytes:,} bytes; "
            f"{self.bits_per_parameter:.4f} bit per parameter{nominal}"
        )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110)
        console.print(self.table())
        for line in self.notes():
            console.print(line, highlight=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def summarise(content: Content, file_bytes: int, shared_bytes: int = 0) -> Report:
    """Return the report of a delta that takes `file_bytes`, beside a shared file of `shared_bytes`."""
    tuned = [record for record in content.records if record.role is not Role.BASE_ONLY]
    rows = {kind: [record for record in tuned if _kind(record) == kind] for kind in _KINDS}
    nominal = content.metadata.get("nominal_bits")
    return Report(
        method=dict(content.metadata.get("method", {})),
        tensors=len(tuned),
        elements=sum(math.prod(record.shape) for record in tuned),
        checkpoint_bytes=sum(math.prod(record.shape) * record.dtype.itemsize for record in tuned),
        file_bytes=file_bytes,
        nominal_bits=nominal,
        rows=tuple(_row(kind, records) for kind, records in rows.items() if records),
        whole=tuple(record.name for record in tuned if record.role is Role.WHOLE),
        base_only=tuple(record.name for record in content.records if record.role is Role.BASE_ONLY),
        shared=content.shared.hex(),
        shared_bytes=shared_bytes,
    )


def _call(method: dict[str, Any], *, host: bool = True) -> str:
    """Return a method as it is written: its name and parameters, a method that it hosts among them."""
    values = {
        key: _call(cast("dict[str, Any]", value), host=False) if host and isinstance(value, dict) else value
        for key, value in method.items()
    }
    parameters = ", ".join(f"{key}={value}" for key, value in values.items() if key != "name")
    return f"{method.get('name', 'delta')}({parameters})"


def _kind(record: Record) -> str:
    if record.role is Role.ADD:
        halves = [item.pipeline == HALF for item in record.payloads]
        return "half" if halves and all(halves) else "method"  # a method may have nothing to keep of a tensor
    return {Role.XOR: "bits", Role.WHOLE: "whole", Role.SAME: "same", Role.DROP: "drop"}[record.role]


def _row(kind: str, records: list[Record]) -> Row:
    kept = sum(kept_values(item, record.shape) for record in records for item in record.payloads)
    elements = sum(math.prod(record.shape) for record in records)
    return Row(kind, len(records), elements, kept, sum(record.payload_bytes for record in records))
