"""What every fit is: a frozen dataclass that finds the scales of payloads after they are encoded."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from dtrain.fit.problem import Factors, Problem
from dtrain.methods.method import Needing, Needs


class Found(NamedTuple):
    """What a fit found.

    Args:
        factors: Logarithms of what the scales are to be multiplied with.
        start: The objective before; None where there is no objective.
        loss: The objective after. Where it is more than before, `fit_scales` keeps the start.
        notes: What else is worth knowing, JSON-serialisable.
    """

    factors: Factors
    start: float | None
    loss: float | None
    notes: dict[str, Any]


class Fit(Needing):
    """A way to find scales. Subclasses are frozen dataclasses; `dtrain.compress(..., fit=...)` takes one.

    No fit makes the objective worse than it was at the start: where it would, the start is kept, and the delta's
    metadata say so (`kept`).
    """

    @property
    def needs(self) -> Needs:
        """What `compress` has to be given: an "objective", or for some closed forms "inputs" or "covariance"."""
        return "objective"

    @property
    def draws(self) -> int:
        """Number of random masks that the objective is averaged over. The file holds the first."""
        return 1

    @abstractmethod
    def run(self, problem: Problem) -> Found:
        """Fit the scales of `problem`, which is open.

        Raises:
            InputError: If the objective cannot be used, or is nowhere finite.
        """

    def describe(self) -> dict[str, Any]:
        """Return the name, and the arguments that differ from the defaults, JSON-serialisable."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        default = {field.name: field.default for field in fields(self) if field.default is not MISSING}  # type: ignore[arg-type]
        changed = {name: value for name, value in values.items() if value != default.get(name, MISSING)}
        return {"name": type(self).__name__, **changed}
