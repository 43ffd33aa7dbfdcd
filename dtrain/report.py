"""What a delta costs: bytes by kind of tensor and by what was done with it, counted on the file."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any, cast

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dtrain.artifact import Content, Record, Role
from dtrain.rules import is_matrix, is_weight_or_bias, matches
from dtrain.stages import HALF, BFloat16, Float16, Sign, Uniform, kept_values

#: Kinds of tensors, by name, shape and dtype, in the order of the table.
_KINDS = {
    "matrix": "matrices",
    "embedding": "embeddings",
    "vector": "norms and biases",
    "token": "other vectors",
    "buffer": "buffers",
    "fresh": "head, new tensors",
}
#: What was done with them.
_DONE = {
    "method": "compressed by the method",
    "half": "delta in half precision",
    "coded": "delta, {bits} bit a value",
    "bits": "bit for bit",
    "exact": "stored whole",
    "rounded": "stored whole, {bits} bit a value",
    "same": "unchanged",
    "drop": "left at the base by a rule",
}
_SHOWN = 4  # names in one line
_FIXED = (Float16, BFloat16, Sign, Uniform)
#: Usual names of embeddings, of tokens, positions and patches, in encoders and decoders. For the table only.
_EMBEDDINGS = tuple(
    pattern for name in ("*embed*", "shared.weight", "wte.weight", "wpe.weight") for pattern in (name, f"*.{name}")
)


@dataclass(frozen=True)
class Row:
    """Tensors of one kind with which the same was done.

    Args:
        kind: "matrix", "embedding", "vector" (a norm or a bias), "token" (any other vector), "buffer" (not floating
            point) or "fresh" (stored without the base).
        done: "method", "half" (delta in half precision), "coded" (delta of a few bits a value), "bits" (bit for bit),
            "exact" or "rounded" (stored whole, so or of a few bits a value), "same" (unchanged) or "drop" (left at the
            base).
        value_bits: Bits of one value for "coded" and "rounded", else None.
        tensors: How many.
        elements: Their elements.
        kept: Values that are stored of them.
        payload_bytes: Bytes of the file that they take, without names and digests.
    """

    kind: str
    done: str
    value_bits: int | None
    tensors: int
    elements: int
    kept: int
    payload_bytes: int

    @property
    def bits_per_element(self) -> float:
        """Payload bits per element of the tensors."""
        return 8 * self.payload_bytes / max(self.elements, 1)


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
        rows: Bytes by kind of tensor and what was done with it.
        whole: Names of tensors the base does not have.
        dropped: Names of tensors that a rule left at the base, though they had changed.
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
    dropped: tuple[str, ...]
    base_only: tuple[str, ...]
    shared: str = ""
    shared_bytes: int = 0

    @property
    def ratio(self) -> float:
        """Bytes of the fine-tuned checkpoint / bytes of the delta file. Nothing else is ever called a ratio."""
        return self.checkpoint_bytes / self.file_bytes

    @property
    def manifest_bytes(self) -> int:
        """Bytes of the file that are no payload: names, digests, checksums, scales, metadata."""
        return self.file_bytes - sum(row.payload_bytes for row in self.rows)

    @property
    def bits_per_parameter(self) -> float:
        """Bits of the file per element of the whole model."""
        return 8 * self.file_bytes / max(self.elements, 1)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-serialisable values."""
        rows = [{**asdict(row), "bits_per_element": row.bits_per_element} for row in self.rows]
        whole = {"ratio": self.ratio, "bits_per_parameter": self.bits_per_parameter}
        return {**asdict(self), "rows": rows, "manifest_bytes": self.manifest_bytes, **whole}

    def notes(self) -> list[str]:
        """Return what the table does not show: a shared file, tensors stored whole or left out."""
        shared = f"needs the shared file of {self.shared_bytes:,} bytes, SHA-256 {self.shared}, not counted here"
        lines = [shared] if self.shared else []
        lines += [f"stored whole: {', '.join(map(visible, self.whole))}"] if self.whole else []
        if self.dropped:
            more = f" and {len(self.dropped) - _SHOWN} more" if len(self.dropped) > _SHOWN else ""
            listed = ", ".join(map(visible, self.dropped[:_SHOWN]))
            lines += [f"changed, but left at the base (see the rules `drop` and `embeddings`): {listed}{more}"]
        left_out = ", ".join(map(visible, self.base_only))
        return lines + ([f"in the base only, left out: {left_out}"] if self.base_only else [])

    def table(self) -> Table:
        """Return a rich table."""
        table = Table(title=Text(visible(_call(self.method))), title_justify="left", show_footer=True)
        table.add_column("tensors", footer="file")
        table.add_column("what was done")
        table.add_column("count", justify="right", footer=f"{self.tensors:,}")
        table.add_column("elements", justify="right", footer=f"{self.elements:,}")
        table.add_column("kept", justify="right")
        table.add_column("bytes", justify="right", footer=f"{self.file_bytes:,}")
        table.add_column("bit each", justify="right", footer=f"{self.bits_per_parameter:.4f}")
        for row in self.rows:
            share = f"{row.kept / row.elements:.2%}" if row.elements else "-"
            done, bits = _DONE[row.done].format(bits=row.value_bits), f"{row.bits_per_element:.4f}"
            counts = (f"{row.tensors:,}", f"{row.elements:,}", share, f"{row.payload_bytes:,}", bits)
            table.add_row(_KINDS[row.kind], done, *counts)
        table.add_row("manifest", "names, digests, scales", "", "", "", f"{self.manifest_bytes:,}", "")
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
            console.print(line, markup=False, highlight=False)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def visible(text: str) -> str:
    """Return a name as it may be shown: what a file says must not move a terminal's cursor or ring its bell."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def summarise(content: Content, file_bytes: int, shared_bytes: int = 0) -> Report:
    """Return the report of a delta that takes `file_bytes`, beside a shared file of `shared_bytes`."""
    tuned = [record for record in content.records if record.role is not Role.BASE_ONLY]
    rows: dict[tuple[str, str, int | None], list[Record]] = {}
    for record in tuned:
        rows.setdefault((_kind(record), *_done(record)), []).append(record)
    order = sorted(rows, key=lambda row: (list(_KINDS).index(row[0]), list(_DONE).index(row[1]), row[2] or 0))
    nominal = content.metadata.get("nominal_bits")
    return Report(
        method=dict(content.metadata.get("method", {})),
        tensors=len(tuned),
        elements=sum(math.prod(record.shape) for record in tuned),
        checkpoint_bytes=sum(math.prod(record.shape) * record.dtype.itemsize for record in tuned),
        file_bytes=file_bytes,
        nominal_bits=nominal,
        rows=tuple(_row(*row, rows[row]) for row in order),
        whole=tuple(record.name for record in tuned if record.role is Role.WHOLE),
        dropped=tuple(record.name for record in tuned if record.role is Role.DROP),
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
    if record.role is Role.WHOLE:
        return "fresh"
    if not record.dtype.is_floating_point:
        return "buffer"
    if is_matrix(record.shape):
        return "embedding" if matches(record.name, _EMBEDDINGS) else "matrix"
    return "vector" if is_weight_or_bias(record.name) else "token"


def _done(record: Record) -> tuple[str, int | None]:
    """Return what was done with a tensor, and bits of a value where it has as many whatever the method."""
    if record.role in (Role.XOR, Role.SAME, Role.DROP):
        return {Role.XOR: "bits", Role.SAME: "same", Role.DROP: "drop"}[record.role], None
    stages = [item.pipeline for item in record.payloads]
    fixed = [
        stage.quantise.bits * stage.quantise.symbols_per_value for stage in stages if isinstance(stage.quantise, _FIXED)
    ]
    if record.role is Role.WHOLE:
        return ("rounded", fixed[0]) if fixed else ("exact", None)
    if stages and all(stage == HALF for stage in stages):
        return "half", None
    # A method has matrices only. Of one of them it may have nothing to keep.
    return ("method", None) if is_matrix(record.shape) or not fixed else ("coded", fixed[0])


def _row(kind: str, done: str, value_bits: int | None, records: list[Record]) -> Row:
    kept = sum(kept_values(item, record.shape) for record in records for item in record.payloads)
    elements = sum(math.prod(record.shape) for record in records)
    return Row(kind, done, value_bits, len(records), elements, kept, sum(record.payload_bytes for record in records))
