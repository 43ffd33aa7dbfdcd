"""The picture: MB/s by operation and peak memory against the number of parameters, on logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.speed.pairs import SIZES, shapes
from bench.speed.tables import COPY, STEPS, Found, cells, floor_step, rate

OUT = Path("docs/results/speed.png")
PANELS = {"write": "compress and save", "read": "load and rebuild", "swap": "apply", "memory": "peak memory of writing"}
STYLES = {
    "floor": {"linestyle": ":", "marker": "^"},
    "dtrain": {"linestyle": "-", "marker": "o", "linewidth": 2.5},
    "peer": {"linestyle": "--", "marker": "s", "markerfacecolor": "none"},
}


def draw(out: Path = OUT) -> None:
    """Draw what has been measured in bfloat16, the dtype in which all sizes are."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(19, 5), layout="constrained")
    colours, found = {}, cells()
    for axis, (panel, title) in zip(axes, PANELS.items(), strict=True):
        for name, kind, values in curves(found, panel):
            colours.setdefault(name, f"C{len(colours) % 10}")
            x, y = list(values), list(values.values())
            axis.plot(x, y, color=colours[name], label=name, **STYLES[kind])
        axis.set(xscale="log", yscale="log", xlabel="parameters", title=title)
        axis.set_xticks([parameters(size) for size in SIZES], labels=list(SIZES), minor=False)
        axis.set_xticks([], minor=True)
        axis.set_ylabel("of the checkpoint's size" if panel == "memory" else "MB/s of the checkpoint")
        axis.grid(alpha=0.3)
    handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=8, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def curves(found: Found, panel: str) -> Iterator[tuple[str, str, dict[int, float]]]:
    """Yield name, kind and points of every line of a panel."""
    lines: dict[str, tuple[str, dict[int, float]]] = {}
    for (dtype, size), these in found.items():
        if dtype != "bfloat16":
            continue
        for name, kind, value in points(these, panel):
            lines.setdefault(name, (kind, {}))[1][parameters(size)] = value
    for name, (kind, values) in lines.items():
        yield name, kind, values


def points(these: dict[str, Any], panel: str) -> Iterator[tuple[str, str, float]]:
    if panel == "memory":
        for key, cell in these.items():
            if key.startswith("memory | "):
                name = key.removeprefix("memory | ")
                kind = "dtrain" if name.startswith("dtrain ") else "peer"
                yield name, kind, max(cell["found"]["write"].values()) / cell["checkpoint_bytes"]
        return
    rows = these.get(panel, {}).get("found", {})
    for name, row in rows.items():
        yield name, row["kind"], rate(row, rows[COPY]["bytes"], floor_step(row, STEPS[panel]))


def parameters(size: str) -> int:
    return sum(math.prod(shape) for shape in shapes(SIZES[size]).values())
