"""One number for bytes and score together, which a sweep can minimise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtrain.errors import InputError


@dataclass(frozen=True)
class Trade:
    """Trades bytes against score: of all files that are good enough, the smallest is the best.

        objective = log10(bytes) + log2(1 + excess / tolerance)

    The excess is what the score falls short of the reference beyond the tolerance. Within the tolerance only bytes
    count. Beyond it, one tolerance weighs as much as ten times the bytes, three as much as a hundred times, seven as
    much as a thousand times: steep where it begins, so that a worse file hardly ever wins by its size, and flat far
    away, so that one trial that went wrong does not hide the differences between the others from a Bayesian search.

    Args:
        tolerance: Loss of score that does not matter, in units of the metric.
        reference: Score that the loss is counted from; None for the one of the fine-tuned model.

    Raises:
        InputError: If the tolerance is not positive, or the reference is not finite.
    """

    tolerance: float = 0.005
    reference: float | None = None

    def __post_init__(self) -> None:
        if not (self.tolerance > 0 and math.isfinite(self.tolerance)):
            raise InputError(f"`tolerance` must be above 0, got {self.tolerance}. 0.005 is half a point of accuracy.")
        if self.reference is not None and not math.isfinite(self.reference):
            raise InputError(f"`reference` must be a score, got {self.reference}. None is the fine-tuned model's.")

    def shortfall(self, score: float, finetuned: float, mode: str) -> float:
        """Return how much worse `score` is than the reference, or than the fine-tuned model where there is none."""
        reference = finetuned if self.reference is None else self.reference
        return reference - score if mode == "max" else score - reference

    def objective(self, size: float, shortfall: float) -> float:
        """Return the number to minimise, for a file of `size` bytes; it is not a number where the score is none."""
        excess = max(shortfall - self.tolerance, 0.0)  # in this order: the other would turn NaN into 0
        return math.log10(size) + math.log2(1 + excess / self.tolerance)

    def values(self, size: float, shortfall: float) -> dict[str, float]:
        """Return what goes to the loggers."""
        feasible = float(shortfall <= self.tolerance)
        return {"dtrain/objective": self.objective(size, shortfall), "dtrain/feasible": feasible}
