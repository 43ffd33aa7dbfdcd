"""The two scalars of DBMS by search: lam on a grid, from coarse to fine, and eta solved at every point of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dtrain.errors import InputError
from dtrain.fit.problem import Factors, Problem

_LAMS = (1.0, 0.75, 0.5, 0.25, 0.0, 1.25, 1.5)  # the start first: from its eta the others' are not far
_REFINE = 3  # points between the neighbours of the best one
_NEAR = math.log(2)  # how far from the best eta so far that of another lam is looked for
_CLOSE = 0.1  # eta is found to about a twentieth

Point = tuple[float, float]


def search_shift(problem: Problem, evaluate: Callable[[Factors], float]) -> tuple[Factors, float, float]:
    """Return the best (lam, eta) for all tensors, the loss at the start and the loss at it.

    The codes of the residual follow lam. What the method fixes is not searched.

    Args:
        problem: Has two scales per tensor.
        evaluate: The objective at logarithms of both.

    Raises:
        InputError: If the objective is nowhere finite.
    """
    shift_is_free, scale_is_free = problem.free
    low, start, high = problem.range
    seen: dict[Point, float] = {}

    def look(lam: float) -> None:
        """Find the best eta at one lam: in all of its range at first, near the best one after that."""
        log = math.log(lam) if lam else -math.inf

        def loss(eta: float) -> float:
            if (lam, eta) not in seen:
                seen[lam, eta] = evaluate(problem.constant(log, eta))
            return seen[lam, eta]

        if not scale_is_free:
            loss(0.0)
        elif not seen:
            loss(start)
            _golden(loss, low, high)
        else:
            near = _best(seen)[1]
            _golden(loss, max(low, near - _NEAR), min(high, near + _NEAR))

    for lam in _LAMS if shift_is_free else (1.0,):  # times what the method fixes
        look(lam)
    if shift_is_free:
        best, lams = _best(seen)[0], sorted(_LAMS)
        at = lams.index(best)
        left, right = lams[max(at - 1, 0)], lams[at + 1] if at + 1 < len(lams) else 2 * best
        for i in range(1, _REFINE + 1):
            if (lam := left + (right - left) * i / (_REFINE + 1)) not in lams:
                look(lam)
    lam, eta = _best(seen)
    begun = seen[1.0, start if scale_is_free else 0.0]
    return problem.constant(math.log(lam) if lam else -math.inf, eta), begun, seen[lam, eta]


def _golden(loss: Callable[[float], float], low: float, high: float) -> None:
    """Evaluate the points of a golden-section search (Kiefer 1953), which takes the loss to have one valley."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    while high - low > _CLOSE:  # each step needs one new point: the other is one of the step before
        if loss(left) <= loss(right):
            high, right = right, left
            left = high - ratio * (high - low)
        else:
            low, left = left, right
            right = low + ratio * (high - low)


def _best(seen: dict[Point, float]) -> Point:
    best = min(seen, key=lambda point: seen[point])
    if not math.isfinite(seen[best]):
        raise InputError("the objective is NaN or infinite for every shift. Check the model and the training inputs.")
    return best
