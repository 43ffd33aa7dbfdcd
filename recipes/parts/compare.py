"""What a few other keep rates would have cost: score against bytes, with what to compare it to."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from dtrain.callbacks.live import load_weights
from parts.picture import score_against_bytes, score_table

KEEPS = (0.3, 0.1, 0.03, 0.01, 0.003)  # points of the picture


def compare(
    module: nn.Module,
    callback: DeltaCompressionCallback,
    base: dtrain.Weights,
    *,
    score: Callable[[], float],
    probe: Callable[[], float],
    inputs: Sequence[Any],
    title: str,
    metric: str = "accuracy",
    forward: Callable[[nn.Module, Any], object] | None = None,
    keeps: Sequence[float] = KEEPS,
) -> None:
    """Compress once more at a few keep rates, draw score against bytes beside the delta file, and print the table.

    Args:
        module: The fine-tuned network; it holds its weights again in the end.
        callback: Says how to compress. Plain `Dare` is drawn beside its method. Where scales are fitted to the metric,
            they are fitted to hidden states here.
        base: The weights that the fine-tuning started from.
        score: Scores `module` with the weights that it holds when called.
        probe: Scores a linear probe; called while `module` holds the base.
        inputs: Training inputs that were not trained on, in batches: some to learn from, the last to stop by.
        title: What was measured.
        metric: Name of the score.
        forward: Runs the module on one batch of `inputs`, where calling it on that is not right.
        keeps: Keep rates.
    """
    live = dtrain.read_weights(module)  # not a plain dict: the base may know a tied tensor by another of its names
    tuned = replace(live, tensors={name: tensor.clone() for name, tensor in live.tensors.items()})
    lines = {"fine-tuned": score()}
    methods = {"Dare": (dtrain.Dare(), None), type(callback.method).__name__: (callback.method, callback.fit)}
    drawn = {name: (method, fit) for name, (method, fit) in methods.items() if can_keep(method)}
    points: dict[str, list[tuple[int, float]]] = {name: [] for name in drawn}  # bytes on disk, score
    change = dtrain.LogitChange if callback.fit_on == "logits" else dtrain.HiddenChange
    objective = change(module, inputs, forward)
    calibration = dtrain.Calibration(module, inputs, forward)
    try:
        for keep, (name, (method, fit)) in product(keeps, drawn.items()):
            delta = dtrain.compress(
                base,
                tuned,
                at_keep(method, keep),
                fit=fit,
                objective=objective,
                calibration=calibration,
                rules=callback.rules,
                shared=callback.shared,
            )
            load_weights(module, delta.state_dict(base))
            points[name].append((delta.file_bytes(), score()))
            load_weights(module, tuned.tensors)
        load_weights(module, base.tensors)
        lines |= {"linear probe": probe(), "base": score()}
    finally:
        load_weights(module, tuned.tensors)
    show(callback.outcome.path.with_name("score_against_bytes.png"), keeps, points, lines, title, metric)


def show(
    path: Path,
    keeps: Sequence[float],
    points: Mapping[str, Sequence[tuple[int, float]]],
    lines: Mapping[str, float],
    title: str,
    metric: str,
) -> None:
    """Draw the picture and print the table of what was compared."""
    score_against_bytes(points, lines, path, title, metric)
    rows = dict(zip(keeps, zip(*points.values(), strict=True), strict=True))
    Console().print(score_table(rows, points, lines, title))
    sys.stdout.write(f"picture: {path}\n")


def can_keep(method: dtrain.Method) -> bool:
    """Return whether a method, or the one that it hosts, has a keep rate."""
    return hasattr(getattr(method, "host", method), "keep")


def at_keep(method: dtrain.Method, keep: float) -> dtrain.Method:
    """Return a method at another keep rate."""
    host = getattr(method, "host", None)
    return replace(method, keep=keep) if host is None else replace(method, host=replace(host, keep=keep))
