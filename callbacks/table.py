"""The table a run ends with: what the delta costs in quality and in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from dtrain.report import Report


def outcome_table(scores: Mapping[str, Mapping[str, float]], report: Report, monitor: str | None = None) -> Table:
    """Return one row per metric, the monitored one first, and one for the bytes.

    Args:
        scores: Values by metric for the models "base", "finetuned" and "compressed"; empty where none was measured.
        report: The size of the delta.
        monitor: The metric to show first.
    """
    table = Table(title=describe(report.method), title_justify="left")
    table.add_column("")
    for who in ("base", "finetuned", "compressed"):
        table.add_column(who, justify="right")
    table.add_column("gain kept", justify="right")
    for name, *found in score_rows(scores, monitor):
        values = ("-" if value is None else f"{value:.4f}" for value in found)
        table.add_row(name, *values, _gain_kept(*found))
    table.add_section()
    table.add_row("bytes", "", f"{report.checkpoint_bytes:,}", f"{report.file_bytes:,}", "")
    table.add_row("ratio", "", "1", f"{report.ratio:,.1f}", "")
    table.add_row("bit per parameter", "", "", f"{report.bits_per_parameter:.4f}", "")
    return table


def score_rows(
    scores: Mapping[str, Mapping[str, float]], monitor: str | None = None
) -> list[tuple[str, float | None, float | None, float | None]]:
    """Return (name, base, fine-tuned, compressed) for every metric, the monitored one first."""
    names = {name for found in scores.values() for name in found}
    order = sorted(names, key=lambda name: (name != monitor, name))
    base, tuned, compressed = (scores.get(who, {}) for who in ("base", "finetuned", "compressed"))
    return [(name, base.get(name), tuned.get(name), compressed.get(name)) for name in order]


def describe(method: Mapping[str, Any]) -> str:
    """Return a method as it would be written in Python."""
    parameters = ", ".join(f"{key}={value!r}" for key, value in method.items() if key != "name")
    return f"{method.get('name', 'delta')}({parameters})"


def _gain_kept(base: float | None, tuned: float | None, compressed: float | None) -> str:
    if base is None or tuned is None or compressed is None or tuned == base:
        return "-"  # nothing was gained, so there is no share of it
    return f"{(compressed - base) / (tuned - base):.1%}"
