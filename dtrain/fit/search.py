"""Search: try scales, and keep what the objective likes best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dtrain.errors import InputError
from dtrain.fit.base_shift import search_shift
from dtrain.fit.fit import Fit, Found
from dtrain.fit.problem import Factors, Problem, Range
from dtrain.methods.method import check_choice, check_type
from dtrain.progress import progress

_GRID = 13  # points of the first grid: a factor of 1.47 apart at keep=0.01
_REFINE = 5  # points of the second, between the neighbours of the best
_GOLDEN = 12  # steps: the bracket shrinks to 1/123 of its length
_STEP = math.log(2) / 2  # one tensor's scale moves by a factor of 1.41 at a time

Loss = Callable[[float], float]


@dataclass(frozen=True)
class Search(Fit):
    """Try scales on a logarithmic range, by evaluating the objective and nothing else.

    For a method with a q, 1/q goes from 1 to 1/keep, as in DAREx (arXiv 2410.09344, section 4), and for signs up to
    four times that; for others the scale goes from a quarter of the method's own to four times. Of two scales, as in
    `Dbms`, the shift is tried on a grid and the other found by golden section at each of its points. Works with any
    objective, a task metric among them; of scales that are equally good the middle one is taken (of pairs the first).

    Args:
        per: One scale for the "model"; or one for every "tensor", moved one after the other from the model's.
        scan: "grid": an even grid, refined once around its best point; "golden": golden-section search.
        masks: Number of random masks the objective is averaged over. The file holds the first.

    Raises:
        InputError: If an argument is out of its range.
    """

    per: Literal["model", "tensor"] = "model"
    scan: Literal["grid", "golden"] = "grid"
    masks: int = 1

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("model", "tensor"))
        check_choice("scan", self.scan, ("grid", "golden"))
        check_type("masks", self.masks, int)
        if self.masks < 1:
            raise InputError(f"`masks` must be at least 1, got {self.masks}. Use masks=3 for a stable scale.")

    @property
    def draws(self) -> int:
        """Number of random masks."""
        return self.masks

    def run(self, problem: Problem) -> Found:
        """Evaluate, compare, keep the best."""
        with progress(f"searching scales ({problem.label})") as advance:

            def evaluate(x: Factors) -> float:
                loss = problem.evaluate(x)
                advance(f"loss {loss:.5g}")
                return loss

            x, start, loss = (
                search_shift(problem, evaluate) if problem.groups == 2 else _global(problem, evaluate, self.scan)
            )
            if self.per == "tensor" and problem.free[-1]:
                x, loss = _descend(evaluate, x, list(problem.matrices), loss, problem.range)
        return Found(x, start, loss, {"evaluations": problem.evaluations})


def _global(
    problem: Problem, evaluate: Callable[[Factors], float], how: Literal["grid", "golden"]
) -> tuple[Factors, float, float]:
    """Return the best scale for all tensors, the loss at the start and the loss at it."""
    scan = _scan_grid if how == "grid" else _scan_golden
    seen = scan(lambda value: evaluate(problem.constant(value)), problem.range)
    best = best_of(seen)
    return problem.constant(best), seen[problem.range.start], seen[best]


def _scan_grid(loss: Loss, where: Range) -> dict[float, float]:
    """Evaluate an even grid and the start, then a finer grid between the neighbours of the best point."""
    low, start, high = where
    step = (high - low) / (_GRID - 1)
    grid = (*(low + step * i for i in range(_GRID - 1)), high)
    near = min(grid, key=lambda x: abs(x - start))
    if abs(near - start) < 1e-9:  # one and the same but for rounding
        grid = tuple(start if x == near else x for x in grid)
    seen = {x: loss(x) for x in dict.fromkeys((*grid, start))}
    best = best_of(seen)
    left, right = max(low, best - step), min(high, best + step)
    for i in range(1, _REFINE + 1):
        x = left + (right - left) * i / (_REFINE + 1)
        if x not in seen:
            seen[x] = loss(x)
    return seen


def _scan_golden(loss: Loss, where: Range) -> dict[float, float]:
    """Golden-section search (Kiefer 1953), which takes the loss to have one valley."""
    ratio = (math.sqrt(5) - 1) / 2
    low, start, high = where
    seen = {x: loss(x) for x in dict.fromkeys((low, start, high))}
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    for _ in range(_GOLDEN - 2):
        for x in (left, right):
            if x not in seen:
                seen[x] = loss(x)
        if seen[left] <= seen[right]:
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)
    return seen


def best_of(seen: Mapping[float, float]) -> float:
    """Return the x of the least loss; of several (a metric has plateaus) the middle one.

    Raises:
        InputError: If there is none that is finite.
    """
    least = min(seen.values())
    if not math.isfinite(least):
        raise InputError("the objective is NaN or infinite for every scale. Check the model and the training inputs.")
    ties = sorted(x for x, value in seen.items() if value == least)
    return ties[len(ties) // 2]


def _descend(
    evaluate: Callable[[Factors], float], x: Factors, names: Sequence[str], loss: float, where: Range
) -> tuple[Factors, float]:
    """Move one tensor's last scale after the other for as long as the loss falls: it can only get better."""
    for name in names:
        for step in (_STEP, -_STEP):
            improved = False
            while where.low <= float((moved := _moved(x[name], step))[-1, 0]) <= where.high:
                trial = evaluate({**x, name: moved})
                if not trial < loss:
                    break
                x, loss, improved = {**x, name: moved}, trial, True
            if improved:
                break
    return x, loss


def _moved(x: Tensor, step: float) -> Tensor:
    out = x.clone()
    out[-1] += step
    return out
