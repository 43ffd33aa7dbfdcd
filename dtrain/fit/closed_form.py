"""Closed forms: scales that follow from the delta, and from what the layers see."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.fit.fit import Fit, Found
from dtrain.fit.problem import Problem
from dtrain.methods import Inputs, Rescaled
from dtrain.methods.bound import bound_q, least_squares_q
from dtrain.methods.method import Needs, check_choice, check_type
from dtrain.progress import progress
from dtrain.stages import matrix_shape, rebuild

Rule = Literal["norm", "mean", "parallel", "mse", "gram", "expected", "bound"]
_RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class ClosedForm(Fit):
    """Compute scales from the delta D and what is decoded of it, D_hat, without trying any.

    * "norm": ||D|| / ||D_hat||, which keeps the Frobenius norm.
    * "mean": sum |D| / sum |D_hat|, as Delta-DCT does (arXiv 2503.06676).
    * "parallel": <D, D> / <D, D_hat>, with which the part of D_hat along D is D: for signs on a random mask more than
      1/keep, by the mean of D^2 over the square of the mean of |D| (ours).
    * "mse": <D, D_hat> / <D_hat, D_hat>, of least squared error in the weights.
    * "gram": tr(D G D_hat^T) / tr(D_hat G D_hat^T) with the Gram matrix G of the layer's inputs: of least squared error
      in the layer's outputs, for the very mask that was drawn (ours).
    * "expected": the same for the mean over all masks, q = keep + (1 - keep) sum Q / sum S^2 on a sample of the inputs
      (ours).
    * "bound": q of DAREx's Chernoff bound on a sample of the inputs (arXiv 2410.09344, App. E).

    The last three need a calibration, the last two a method with a q; a tensor that is no layer's weight keeps its
    scale. Least squares shrinks: it brings back less than the whole delta. Of two scales, as in `Dbms`, it is the
    residual's that is computed. Where there is an objective as well, the better of start and result is kept.

    Args:
        rule: How a scale is computed.
        per: One scale for every "tensor" or for every "row" (output): the latter with the first five rules.
        eta: For rule="bound": the bound's free parameter, in units of 1 / output.

    Raises:
        InputError: If an argument is out of its range.
    """

    rule: Rule = "norm"
    per: Literal["tensor", "row"] = "tensor"
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, _RULES)
        check_choice("per", self.per, ("tensor", "row"))
        check_type("eta", self.eta, float)
        if not 0 < self.eta < math.inf:
            raise InputError(f"`eta` must be a positive number, got {self.eta}. Start with eta=1.")
        if self.per == "row" and self.rule in ("expected", "bound"):
            raise InputError(f"rule={self.rule!r} is a mean over rows. Use per='tensor', or another rule.")

    @property
    def needs(self) -> Needs:
        """Nothing, the covariance of every layer's inputs, or a sample of them."""
        return {"gram": "covariance", "expected": "inputs", "bound": "inputs"}.get(self.rule, "nothing")  # type: ignore[return-value]

    def run(self, problem: Problem) -> Found:
        """Compute every tensor's scale."""
        if self.per == "row" and problem.groups > 1:
            raise InputError("rows of a base vector and of its residual cannot be scaled apart. Use per='tensor'.")
        start = problem.start()
        begun = None if problem.objective is None else problem.evaluate(start)
        x = dict(start)
        with progress(f"computing scales ({self.rule})", len(problem.matrices)) as advance:
            for name in problem.matrices:
                x[name] = self._factors(problem, name, x[name])
                advance(name)
        if problem.objective is None:
            return Found(x, None, None, {})
        return Found(x, begun, problem.evaluate_stored(x) if self.per == "row" else problem.evaluate(x), {})

    def _factors(self, problem: Problem, name: str, start: Tensor) -> Tensor:
        """Return the logarithms of one tensor's scales; those of a base vector stay."""
        delta, seen = problem.changes[name].delta().double().cpu(), problem.inputs.get(name)
        *base, last = problem.payloads()[name]
        for group in base:
            delta = delta - rebuild(group, name, delta.shape)
        found = self._scale(problem, delta, rebuild(last, name, delta.shape), seen)
        columns = found.numel() if self.per == "row" else 1
        out = start.expand(-1, columns).contiguous()
        known = found.isfinite() & (found >= 0)
        out[-1] = torch.where(known, found.log(), out[-1])
        return out

    def _scale(self, problem: Problem, delta: Tensor, decoded: Tensor, seen: Inputs | None) -> Tensor:
        """Return one scale, or one per row, of shape (scales,); NaN where none follows."""
        if self.rule in ("gram", "expected", "bound") and seen is None:
            return torch.tensor([math.nan])
        if self.rule in ("expected", "bound"):
            return self._by_q(problem, delta, seen)
        d, found = (self._matrix(value, seen) for value in (delta, decoded))
        if self.rule == "norm":
            above, below = self._sum(d.square()).sqrt(), self._sum(found.square()).sqrt()
        elif self.rule == "mean":
            above, below = self._sum(d.abs()), self._sum(found.abs())
        elif self.rule == "parallel":
            above, below = self._sum(d.square()), self._sum(d * found)
        else:
            weighted = found @ seen.gram.double() if self.rule == "gram" and seen and seen.gram is not None else found
            above, below = self._sum(d * weighted).clamp_min(0), self._sum(found * weighted)
        return above / below

    def _by_q(self, problem: Problem, delta: Tensor, seen: Inputs | None) -> Tensor:
        method = problem.method
        if not isinstance(method, Rescaled):
            raise InputError(
                f"rule={self.rule!r} finds a q, and {type(method).__name__} has none. Use 'gram' or 'mse'."
            )
        if seen is None:
            return torch.tensor([math.nan])
        matrix = seen.matrix(delta)
        if self.rule == "bound":
            q = bound_q(matrix, seen.sample, method.keep, self.eta)
        else:
            q = least_squares_q(matrix, seen.sample, method.keep)
        # Relative to what the payloads are divided by now: the far end of the range stands for q = keep.
        return torch.tensor([method.keep / q * math.exp(problem.range.high)], dtype=torch.float64)

    def _matrix(self, value: Tensor, seen: Inputs | None) -> Tensor:
        """Return the values as rows of outputs, columns of inputs where a Gram matrix says which those are."""
        if self.rule == "gram" and seen is not None:
            if seen.transposed and self.per == "row":
                raise InputError("a weight that is stored transposed has outputs as columns. Use per='tensor'.")
            return seen.matrix(value)
        return value.reshape(matrix_shape(value.shape))

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.sum(1) if self.per == "row" else terms.sum()[None]
