"""DAREx-q: search the rescaling q that an objective likes best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from dtrain.difference import Change
from dtrain.errors import InputError
from dtrain.fit.objective import Objective
from dtrain.fit.trial import Candidate, Trial, candidate
from dtrain.methods import Rescaled
from dtrain.progress import Advance, progress

_GRID = 13  # points of the first grid: a factor of 1.47 apart at keep=0.01
_REFINE = 5  # points of the second, between the neighbours of the best
_GOLDEN = 12  # steps: the bracket shrinks to 1/123 of its length
_LAYER_STEP = math.log(2) / 2  # one layer's q moves by a factor of 1.41 at a time


@dataclass(frozen=True)
class QFit:
    """What a search found.

    Args:
        q: One q per tensor; all the same where the scope is the model.
        loss: The objective at it, averaged over the masks.
        start: The objective at q = keep (plain DARE).
        evaluations: How often the objective was evaluated.
    """

    q: dict[str, float]
    loss: float
    start: float
    evaluations: int


def search_q(method: Rescaled, changes: Sequence[Change], rest: Mapping[str, Tensor], objective: Objective) -> QFit:
    """Search q for one method on one pair of models.

    Args:
        method: Says the rate, the masks to average over, the scope and the search.
        changes: All tensors of the fine-tuned model; those of role "method" get a q.
        rest: The other tensors as they will be after decoding, by name.
        objective: Evaluated on training inputs. Its module is written to, and holds what it held before afterwards.

    Raises:
        InputError: If the objective is NaN or infinite wherever it was evaluated.
    """
    # The models given may be the very module that is written to: what is read later must not move with it.
    changes = [
        replace(c, base=None if c.base is None else c.base.clone(), tuned=c.tuned.clone()) if c.role == "method" else c
        for c in changes
    ]
    tuned = {change.name: change.tuned for change in changes if change.role != "base_only"}
    with Trial(objective.module, tuned) as trial, progress(f"searching q ({objective.label})") as advance:
        trial.write(tuned)
        objective.remember()
        trial.write(rest)
        compressed = [change for change in changes if change.role == "method"]
        evaluate = _Evaluator(method, compressed, trial, objective, advance)
        span = math.log(1 / method.keep)  # everything below is in x = log(1/q), from 0 to span
        scan = _scan_grid if method.search == "grid" else _scan_golden
        seen = scan(lambda x: evaluate({c.name: x for c in compressed}), span)
        best = _best(seen)
        x = {change.name: best for change in compressed}
        loss = seen[best]
        if method.scope == "layer":
            x, loss = _descend(evaluate, x, loss, span)
    q = {name: math.exp(-value) for name, value in x.items()}
    return QFit(q, loss, seen[span], evaluate.count)


class _Evaluator:
    """The objective as a function of log(1/q) per tensor, averaged over several masks."""

    def __init__(
        self, method: Rescaled, changes: Sequence[Change], trial: Trial, objective: Objective, advance: Advance
    ) -> None:
        self._trial, self._objective, self._advance = trial, objective, advance
        self._base = {change.name: _base(change) for change in changes}
        self._masks = [
            self._candidates(replace(method, seed=(method.seed + i) % 2**64), changes) for i in range(method.masks)
        ]
        self.count = 0

    def __call__(self, x: Mapping[str, float]) -> float:
        factors = {name: math.exp(value) for name, value in x.items()}
        losses: list[float] = []
        for mask in self._masks:
            self._trial.write(self._base)
            self._trial.rescale(mask, factors)
            losses.append(self._objective.loss())
        mean = sum(losses) / len(losses)
        self.count += 1
        self._advance(f"loss {mean:.5g}")
        return mean if math.isfinite(mean) else math.inf

    def _candidates(self, method: Rescaled, changes: Sequence[Change]) -> dict[str, Candidate]:
        out: dict[str, Candidate] = {}
        for change in changes:
            payloads = method.encode(change.name, change.delta())
            out[change.name] = candidate(
                change.name, _base(change), payloads, change.tuned.dtype, self._trial.device(change.name)
            )
        return out


def _scan_grid(loss: Callable[[float], float], span: float) -> dict[float, float]:
    """Evaluate an even grid on [0, span], then a finer one between the neighbours of the best point."""
    step = span / (_GRID - 1)
    seen = {x: loss(x) for x in dict.fromkeys((*(step * i for i in range(_GRID - 1)), span))}
    best = _best(seen)
    low, high = max(0.0, best - step), min(span, best + step)
    for i in range(1, _REFINE + 1):
        x = low + (high - low) * i / (_REFINE + 1)
        if x not in seen:
            seen[x] = loss(x)
    return seen


def _scan_golden(loss: Callable[[float], float], span: float) -> dict[float, float]:
    """Golden-section search on [0, span] (Kiefer 1953), which takes the loss to have one valley."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 0.0, span
    seen = {x: loss(x) for x in dict.fromkeys((0.0, span))}
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


def _best(seen: Mapping[float, float]) -> float:
    """Return the x of the least loss; of several (a metric has plateaus) the middle one."""
    least = min(seen.values())
    if not math.isfinite(least):
        raise InputError("the objective is NaN or infinite for every q. Check the model and the calibration inputs.")
    ties = sorted(x for x, value in seen.items() if value == least)
    return ties[len(ties) // 2]


def _descend(
    evaluate: Callable[[Mapping[str, float]], float], x: dict[str, float], loss: float, span: float
) -> tuple[dict[str, float], float]:
    """Move one tensor's q after the other for as long as the loss falls: it can only get better than one q for all."""
    for name in x:
        for step in (_LAYER_STEP, -_LAYER_STEP):
            improved = False
            while 0.0 <= (moved := x[name] + step) <= span:
                trial = evaluate({**x, name: moved})
                if not trial < loss:
                    break
                x, loss, improved = {**x, name: moved}, trial, True
            if improved:
                break
    return x, loss


def _base(change: Change) -> Tensor:
    if change.base is None:
        raise InputError(f"tensor {change.name!r} is new in the fine-tuned model and has no base.")
    return change.base
