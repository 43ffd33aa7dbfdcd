"""The two scalars of DBMS by search: lam on a grid, from coarse to fine, and eta solved at every point of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from dtrain.errors import InputError
from dtrain.fit.problem import Factors, Problem, Range

_LAMS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_REFINE = 3  # points between the neighbours of the best one

Scan = Callable[[Callable[[float], float], Range], dict[float, float]]


def search_shift(problem: Problem, evaluate: Callable[[Factors], float], scan: Scan) -> tuple[Factors, float, float]:
    """Return the best (lam, eta) for all tensors, the loss at the start and the loss at it.

    The codes of the residual follow lam. What the method fixes is not searched.

    Args:
        problem: Has two scales per tensor.
        evaluate: The objective at logarithms of both.
        scan: Searches eta.

    Raises:
        InputError: If the objective is nowhere finite.
    """
    shift_is_free, scale_is_free = problem.free
    seen: dict[tuple[float, float], float] = {}

    def look(lam: float) -> None:
        log = math.log(lam) if lam else -math.inf
        if scale_is_free:
            found = scan(lambda eta: evaluate(problem.constant(log, eta)), problem.range)
            seen.update({(lam, eta): loss for eta, loss in found.items()})
        else:
            seen[lam, 0.0] = evaluate(problem.constant(log, 0.0))

    lams = _LAMS if shift_is_free else (1.0,)  # times what the method fixes
    for lam in lams:
        look(lam)
    if shift_is_free:
        best = _best(seen)[0]
        at = lams.index(best)
        low, high = lams[max(at - 1, 0)], lams[at + 1] if at + 1 < len(lams) else 2 * best
        for i in range(1, _REFINE + 1):
            if (lam := low + (high - low) * i / (_REFINE + 1)) not in lams:
                look(lam)
    lam, eta = _best(seen)
    start = seen[1.0, problem.range.start if scale_is_free else 0.0]
    return problem.constant(math.log(lam) if lam else -math.inf, eta), start, seen[lam, eta]


def _best(seen: dict[tuple[float, float], float]) -> tuple[float, float]:
    best = min(seen, key=lambda point: seen[point])
    if not math.isfinite(seen[best]):
        raise InputError("the objective is NaN or infinite for every shift. Check the model and the training inputs.")
    return best
