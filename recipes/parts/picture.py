"""Score against bytes: the picture a recipe ends with."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from rich.table import Table


def score_against_bytes(
    points: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], path: Path, title: str, metric: str
) -> None:
    """Draw and save a plot.

    Args:
        points: (bytes on disk, score) per method.
        lines: Scores to compare with, by name: base, linear probe, fine-tuned.
        path: Where the PNG goes.
        title: What was measured.
        metric: Name of the score.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for style, (name, score) in zip(("-", "--", ":"), lines.items(), strict=False):
        axes.axhline(score, color="0.45", linestyle=style, linewidth=1.2)
        axes.annotate(
            f"{name} {score:.3f}",
            (0.995, score),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    for marker, (name, series) in zip("osD^v", points.items(), strict=False):
        axes.plot(*zip(*sorted(series), strict=True), marker=marker, label=name)
    axes.set(xscale="log", xlabel="bytes of the delta file", ylabel=f"{metric} on validation", title=title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), fontsize=8)
    axes.grid(alpha=0.25, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def score_table(
    rows: Mapping[float, Sequence[tuple[int, float]]], methods: Iterable[str], lines: Mapping[str, float], title: str
) -> Table:
    """Return the points of the picture as a table.

    Args:
        rows: For every keep rate the (bytes on disk, score) of every method.
        methods: Their names.
        lines: Scores to compare with, by name.
        title: What was measured.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column("keep", justify="right")
    for name in methods:
        table.add_column(name, justify="right")
        table.add_column("bytes", justify="right")
    for keep, points in rows.items():
        table.add_row(f"{keep}", *(text for size, score in points for text in (f"{score:.4f}", f"{size:,}")))
    table.caption = ", ".join(f"{name} {value:.4f}" for name, value in lines.items())
    return table
