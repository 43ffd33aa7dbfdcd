"""Learn: find scales by gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.fit.fit import Fit, Found
from dtrain.fit.problem import Factors, Problem
from dtrain.methods.method import check_choice, check_type
from dtrain.progress import Advance, progress
from dtrain.stages import matrix_shape

_BEGIN = 7  # scales to choose the beginning from: at keep = 0.01 a factor of 2.2 apart


@dataclass(frozen=True)
class Learn(Fit):
    """Learn the logarithms of scales by Adam, and stop where held-out inputs say so.

    The first batches of the objective are learnt from, one a step and in turn; on the last ones the loss is looked at
    every few steps. Learning begins at the best of seven scales that are the same for all tensors. The best scales seen
    on the last batches are kept, and if the objective as a whole is not better with them than at the start, the start
    is kept. Only scales have optimizer state, and no tensor's gradient outlives its own reduction: beside the module
    there are the base and the decoded values, which are few with a mask and as many as the weights without.

    The published fits of this kind are BitDelta's distillation (arXiv 2402.10193, section 3.1) and DAREx's per-layer
    gradient (arXiv 2410.09344, code only). Logarithms, so that a step is a share of the scale, and early stopping that
    keeps the best are ours.

    Args:
        per: One scale for all matrices of the "model", one for every "tensor", norms and biases among them, or one for
            every "row" (output) of each: a row's scale costs nothing with half-precision values, two bytes with signs.
        steps: Steps at most; the learning rate falls linearly to nothing at the last.
        lr: Learning rate of the logarithms: 0.05 moves a scale by at most about 5 % a step.
        every: Steps between two looks at the held-out inputs; there, residuals to a shifted base are encoded anew.
        patience: Looks without improvement after which learning stops.
        held_out: Share of the batches, at least one, that is not learnt from but looked at.
        masks: Number of random masks that are learnt from in turn. The file holds the first.

    Raises:
        InputError: If an argument is out of its range.
    """

    per: Literal["model", "tensor", "row"] = "tensor"
    steps: int = 100
    lr: float = 0.05
    every: int = 10
    patience: int = 3
    held_out: float = 0.25
    masks: int = 1

    def __post_init__(self) -> None:
        check_choice("per", self.per, ("model", "tensor", "row"))
        for name in ("steps", "every", "patience", "masks"):
            check_type(name, getattr(self, name), int)
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("lr", "held_out"):
            check_type(name, getattr(self, name), float)
        if not (0 < self.lr <= 1 and 0 < self.held_out < 1):
            raise InputError(f"`lr` must be in (0, 1] and `held_out` in (0, 1), got {self.lr} and {self.held_out}.")

    @property
    def draws(self) -> int:
        """Number of random masks."""
        return self.masks

    def run(self, problem: Problem) -> Found:
        """Learn, look, keep the best."""
        if self.per == "row" and (problem.groups > 1 or self.masks > 1):
            raise InputError(
                "scales of rows belong to one mask and one payload: not to several masks, nor to a base vector and its "
                "residual. Use masks=1 and another method than Dbms, or per='tensor'."
            )
        learnt, held = self._split(problem)
        start = problem.start()
        first = problem.evaluate(start)
        with progress(f"learning scales ({problem.label})", self.steps) as advance:
            x, begun = _begin(problem, held)
            x, steps, least = self._descend(problem, _spread(x, problem, self.per), begun, learnt, held, advance)
        last = problem.evaluate_stored(x) if self.per == "row" else problem.evaluate(x)
        return Found(x, first, last, {"steps": steps, "held_out": [begun, least]})

    def _split(self, problem: Problem) -> tuple[range, range]:
        batches: int = getattr(problem.objective, "batches", 0)
        if batches == 1:
            raise InputError(
                "Learn learns from some batches and stops by others, and got one. Give smaller batches or more inputs."
            )
        first = batches - max(1, round(batches * self.held_out))
        return range(first), range(first, batches)

    def _descend(
        self, problem: Problem, x: Factors, least: float, learnt: range, held: range, advance: Advance
    ) -> tuple[Factors, int, float]:
        """Return the best factors, the steps made, and the held-out loss at the best."""
        shared = self.per == "model"
        moves = [torch.zeros_like(value) for value in ([next(iter(x.values()))] if shared else x.values())]
        optimizer = torch.optim.Adam(moves, lr=self.lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.steps)
        frozen = [number for number, free in enumerate(problem.free) if not free]
        counted = list(problem.matrices) if shared else list(x)
        best, waited, step = x, 0, 0
        for step in range(1, self.steps + 1):
            now = _moved(x, moves, counted)
            turn, batch = divmod(step - 1, len(learnt))  # every mask sees every batch
            loss, gradient = problem.gradient(now, learnt[batch], turn % self.masks)
            gradients = [gradient[name] for name in counted]
            for move, grad in zip(moves, [sum(gradients[1:], gradients[0])] if shared else gradients, strict=True):
                grad[frozen] = 0.0
                move.grad = grad
            if all(bool(move.grad.isfinite().all()) for move in moves if move.grad is not None):
                optimizer.step()
                schedule.step()
            problem.tell(step, loss)
            advance(f"loss {loss:.5g}, held out {least:.5g}")
            if step % self.every and step != self.steps:
                continue
            now = _moved(x, moves, counted)
            found = problem.evaluate_on(now, held)
            best, least, waited = (now, found, 0) if found < least else (best, least, waited + 1)
            if waited >= self.patience:
                break
        return best, step, least


def _begin(problem: Problem, held: range) -> tuple[Factors, float]:
    """Return the best of a few scales that are the same for all matrices, and its held-out loss."""
    low, start, high = problem.range
    places = [start, *(low + (high - low) * i / (_BEGIN - 1) for i in range(_BEGIN))] if problem.free[-1] else [0.0]
    seen = {place: problem.constant(*[0.0] * (problem.groups - 1), place) for place in places}
    losses = {place: problem.evaluate_on(x, held) for place, x in seen.items()}  # the start may be one of the seven
    best = min(losses, key=lambda place: losses[place])
    return seen[best], losses[best]


def _spread(x: Factors, problem: Problem, per: str) -> Factors:
    """Return the factors with one column per row of each tensor, where rows have their own."""
    if per != "row":
        return x
    rows = {name: matrix_shape(change.tuned.shape)[0] for name, change in problem.changes.items()}
    return {name: value.expand(-1, rows[name]).contiguous() for name, value in x.items()}


def _moved(x: Factors, moves: list[Tensor], names: list[str]) -> Factors:
    every = moves * len(names) if len(moves) == 1 else moves
    return x | {name: x[name] + move for name, move in zip(names, every, strict=True)}
