"""What is to be said of every method in one line, for `dtrain methods` and for the README."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dtrain.methods.method import Method

_SIDE = 768  # of the delta that bytes are counted on: a projection of a base-size encoder


@dataclass(frozen=True)
class Entry:
    """One method with its default arguments.

    Args:
        name: Name of its class.
        needs: What it has to be given: "nothing" or "training inputs".
        nominal_bits: Bits per compressed weight as the paper counts them; None where no figure is claimed.
        true_bits: Bits per compressed weight of the payload, counted on a Gaussian delta of 768 x 768.
        source: Where it comes from.
        summary: What it does, in one sentence.
        arguments: Its default arguments.
    """

    name: str
    needs: str
    nominal_bits: float | None
    true_bits: float | None
    source: str
    summary: str
    arguments: dict[str, Any]


def catalogue(methods: Sequence[type[Method]]) -> list[Entry]:
    """Return one entry per method."""
    delta = torch.randn(_SIDE, _SIDE, generator=torch.Generator().manual_seed(0)) * 1e-3
    return [_entry(method(), delta) for method in methods]


def markdown(entries: Sequence[Entry]) -> str:
    """Return the README's table."""
    lines = ["| method | what it does | data needed | nominal | on disk | source |", "|---|---|---|---|---|---|"]
    for entry in entries:
        bits = f"{shown(entry.nominal_bits)} | {shown(entry.true_bits)}"
        lines.append(f"| `{entry.name}` | {entry.summary.rstrip('.')} | {entry.needs} | {bits} | {entry.source} |")
    return "\n".join(lines)


def shown(bits: float | None) -> str:
    """Return bits per weight as they stand in a table."""
    return "-" if bits is None else f"{bits:.3g}"


def _entry(method: Method, delta: torch.Tensor) -> Entry:
    nominal = method.nominal_bits
    return Entry(
        name=type(method).__name__,
        needs="nothing" if method.needs == "nothing" else "training inputs",
        nominal_bits=None if math.isnan(nominal) else nominal,
        true_bits=None if method.bitwise else _true_bits(method, delta),
        source=method.paper,
        summary=(inspect.getdoc(type(method)) or "").partition("\n")[0],
        arguments={name: value for name, value in method.describe().items() if name != "name"},
    )


def _true_bits(method: Method, delta: torch.Tensor) -> float:
    payloads = method.plan([("weight", lambda: delta)])("weight", delta, None)
    return 8 * sum(payload.data.numel() for payload in payloads) / delta.numel()
