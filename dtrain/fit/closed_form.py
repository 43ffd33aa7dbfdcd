"""Closed forms: scales that follow from the delta, and from what the layers see."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.fit.fit import Fit, Found
from dtrain.fit.problem import Factors, Problem
from dtrain.methods import Inputs, Method, Rescaled
from dtrain.methods.bound import bound_q, least_squares_q
from dtrain.methods.method import Needs, check_choice, check_type
from dtrain.progress import progress
from dtrain.stages import matrix_shape, rebuild

Rule = Literal["norm", "mean", "parallel", "mse", "gram", "expected", "bound"]
_RULES: tuple[Rule, ...] = get_args(Rule)
_ETAS = tuple(10 ** (power / 2) for power in range(-6, 7))


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
        eta: For rule="bound": the bound's free parameter, in units of 1 / output. "search" takes the best of thirteen
            from 0.001 to 1000 by the objective, as the paper searches it.

    Raises:
        InputError: If an argument is out of its range.
    """

    rule: Rule = "norm"
    per: Literal["tensor", "row"] = "tensor"
    eta: float | Literal["search"] = 1.0

    def __post_init__(self) -> None:
        check_choice("rule", self.rule, _RULES)
        check_choice("per", self.per, ("tensor", "row"))
        if self.eta != "search":
            check_type("eta", self.eta, float)
            if not 0 < self.eta < math.inf:
                raise InputError(f"`eta` must be a positive number or 'search', got {self.eta}. Start with eta=1.")
        if self.per == "row" and self.rule in ("expected", "bound"):
            raise InputError(f"rule={self.rule!r} is a mean over rows. Use per='tensor', or another rule.")

    @property
    def needs(self) -> Needs:
        """Nothing, the covariance of every layer's inputs, or a sample of them."""
        return {"gram": "covariance", "expected": "inputs", "bound": "inputs"}.get(self.rule, "nothing")  # type: ignore[return-value]

    def run(self, problem: Problem) -> Found:
        """Compute every tensor's scale."""
        if not problem.method.free[-1]:
            raise InputError("the scale that would be computed is fixed by the method. Give Dbms(eta='fit').")
        if self.per == "row" and problem.groups > 1:
            raise InputError("rows of a base vector and of its residual cannot be scaled apart. Use per='tensor'.")
        start = problem.start()
        if problem.objective is None:
            if self.rule == "bound" and self.eta == "search":
                raise InputError("eta='search' compares by an objective. Pass objective=dtrain.HiddenChange(...).")
            return Found(self._compute(problem, start), None, None, {})
        evaluate = problem.evaluate_stored if self.per == "row" else problem.evaluate
        begun = problem.evaluate(start)
        if self.rule != "bound" or self.eta != "search":
            x = self._compute(problem, start)
            return Found(x, begun, evaluate(x), {})
        tried = {eta: replace(self, eta=eta)._compute(problem, start) for eta in _ETAS}
        losses = {eta: problem.evaluate(x) for eta, x in tried.items()}
        best = min(losses, key=lambda eta: losses[eta])
        return Found(tried[best], begun, losses[best], {"best_eta": best})

    def _compute(self, problem: Problem, start: Factors) -> Factors:
        x = dict(start)
        with progress(f"computing scales ({self.rule})", len(problem.matrices)) as advance:
            for name in problem.matrices:
                x[name] = self._factors(problem, name, x[name])
                advance(name)
        return x

    def _factors(self, problem: Problem, name: str, start: Tensor) -> Tensor:
        """Return the logarithms of one tensor's scales; those of a base vector stay."""
        delta, seen = problem.changes[name].delta().cpu().double(), problem.inputs.get(name)
        *base, last = problem.payloads()[name]
        for group in base:
            delta = delta - rebuild(group, name, delta.shape)
        found = self._scale(problem, delta, rebuild(last, name, delta.shape), seen)
        columns = found.numel() if self.per == "row" else 1
        out = start.expand(-1, columns).clone()
        known = found.isfinite() & (found > 0)  # where nothing points along the delta, the scale stays
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
        divided = _divided_by(method)
        if not isinstance(method, Rescaled) or divided is None:
            raise InputError(
                f"rule={self.rule!r} finds a q, which {type(method).__name__} does not leave open as it is. "
                "Give a method with q='keep', 'search' or a number, or use 'gram' or 'mse'."
            )
        if seen is None:
            return torch.tensor([math.nan])
        matrix = seen.matrix(delta)
        if self.rule == "bound":
            q = bound_q(matrix, seen.sample, method.keep, float(self.eta))
        else:
            q = least_squares_q(matrix, seen.sample, method.keep)
        return torch.tensor([divided / q], dtype=torch.float64)

    def _matrix(self, value: Tensor, seen: Inputs | None) -> Tensor:
        """Return the values as rows of outputs, columns of inputs where a Gram matrix says which those are."""
        if self.rule == "gram" and seen is not None:
            if seen.transposed and self.per == "row":
                raise InputError("a weight that is stored transposed has outputs as columns. Use per='tensor'.")
            return seen.matrix(value)
        return value.reshape(matrix_shape(value.shape))

    def _sum(self, terms: Tensor) -> Tensor:
        return terms.sum(1) if self.per == "row" else terms.sum()[None]


def _divided_by(method: Method) -> float | None:
    """Return the q that a method's payloads are divided by before any fit; None where it is not one number."""
    q: object = getattr(method, "q", None)
    if isinstance(q, str):
        return {"search": 1.0, "keep": float(getattr(method, "keep", 1.0))}.get(q)
    return q if isinstance(q, float) else None
