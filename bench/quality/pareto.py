"""Plots: score against bytes on disk, one per task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib as mpl

mpl.use("Agg")  # nothing is shown
import matplotlib.pyplot as plt

from bench.quality.budgets import BUDGETS
from bench.quality.entries import CHOSEN
from bench.quality.found import Found, shown, side_of
from bench.quality.tables import LOSSLESS, TITLES

PALETTE = ("#0b6e4f", "#1b9e77", "#66a61e", "#33a02c", "#7fbf7b", "#0a9396", "#94d2bd", "#2a9d8f")
PEER_PALETTE = ("#000000", "#d6604d", "#e08214", "#c51b7d", "#8073ac", "#542788", "#2166ac", "#bf812d", "#b2182b")
PEER_PALETTE += ("#4393c3", "#f1b6da", "#dfc27d", "#92c5de")
MARKS = "osD^vP*X<>"


def draw(found: Found, path: Path) -> None:
    """Draw means over the seeds, with the least and the greatest where there are several."""
    figure, axes = plt.subplots(figsize=(9.5, 6), layout="constrained")
    for style, floor in zip(("-", "--", ":"), ("base", "linear probe", "fine-tuned"), strict=True):
        height = fmean(scores[floor] for scores in found.references.values())
        axes.axhline(height, color="0.45", linestyle=style, linewidth=1.1)
        place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "fontsize": 8}
        axes.annotate(f"{floor} {height:.3f}", (0.003, height), **place)
    for budget in BUDGETS:
        axes.axvline(budget, color="0.85", linewidth=0.8, zorder=0)
    drawn = {"dtrain": 0, "stand-in": 0, "peer": 0}
    leading = {found.best(budget, "stand-in").label for budget in BUDGETS}
    labels = [label for label in found.labels if label not in LOSSLESS]  # they have a table of their own
    others = [label for label in labels if side_of(label) == "stand-in" and label not in leading]
    for label in labels:
        side = side_of(label)
        named = f"{len(others)} other presets of published methods" if label in others[:1] else name(label)
        line(axes, found, label, drawn[side], "_nolegend_" if label in others[1:] else named)
        drawn[side] += 1
    axes.set(
        xscale="log",
        xlabel="bit of file per parameter",
        ylabel="score on validation",
    )
    axes.set_title(TITLES.get(found.name, found.name), fontsize=10)
    size = fmean(
        8 * c["file_bytes"] / c["bits_per_parameter"] for cells in found.scored.values() for c in cells.values()
    )
    above = axes.secondary_xaxis("top", functions=(lambda x: x * size / 8, lambda x: x * 8 / size))
    above.set_xlabel("bytes on disk")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def line(axes: plt.Axes, found: Found, label: str, number: int, legend: str) -> None:
    """Draw one entry: ours in green, packages and adapters in warm colours, stand-ins thin and grey."""
    points = sorted(
        (
            fmean(cell["bits_per_parameter"] for cell in cells.values()),
            *spread([cell["score"] for cell in cells.values()]),
        )
        for cells in found.points(label)
    )
    x, y, least, greatest = zip(*points, strict=True)
    side = side_of(label)
    look = {
        "dtrain": {"color": PALETTE[number % len(PALETTE)], "linewidth": 2.4 if label == CHOSEN else 1.4, "zorder": 3},
        "stand-in": {"color": str(0.45 + 0.04 * (number % 9)), "linewidth": 0.8, "linestyle": "--", "zorder": 1},
        "peer": {"color": PEER_PALETTE[number % len(PEER_PALETTE)], "linewidth": 1.2, "zorder": 2},
    }[side]
    bars = ([a - b for a, b in zip(y, least, strict=True)], [b - a for a, b in zip(y, greatest, strict=True)])
    mark = MARKS[number % len(MARKS)]
    axes.errorbar(x, y, yerr=bars, marker=mark, markersize=4, capsize=2, label=legend, **look)


def name(label: str) -> str:
    return f"{label} (chosen in advance)" if label == CHOSEN else shown(label)


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    return fmean(values), min(values), max(values)
