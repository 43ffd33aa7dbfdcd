"""Accuracy against bytes: the picture a recipe ends with."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt


def accuracy_against_bytes(
    points: Mapping[str, Sequence[tuple[int, float]]], lines: Mapping[str, float], path: Path, title: str
) -> None:
    """Draw and save a plot.

    Args:
        points: (bytes on disk, accuracy) per method.
        lines: Accuracies to compare with, by name: base, linear probe, fine-tuned.
        path: Where the PNG goes.
        title: What was measured.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for style, (name, accuracy) in zip(("-", "--", ":"), lines.items(), strict=False):
        axes.axhline(accuracy, color="0.45", linestyle=style, linewidth=1.2)
        axes.annotate(
            f"{name} {accuracy:.3f}",
            (0.995, accuracy),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=8,
        )
    for marker, (name, series) in zip("osD^v", points.items(), strict=False):
        axes.plot(*zip(*sorted(series), strict=True), marker=marker, label=name)
    axes.set(xscale="log", xlabel="bytes of the delta file", ylabel="validation accuracy", title=title)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.08), fontsize=8)
    axes.grid(alpha=0.25, which="both")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
