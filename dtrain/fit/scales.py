"""Run a fit on a problem, keep the better of its start and its result, and say which."""

from __future__ import annotations

import math
from typing import Any

import torch

from dtrain.errors import InputError
from dtrain.fit.fit import Fit
from dtrain.fit.problem import Factors, Problem
from dtrain.fit.search import Search
from dtrain.methods import Dbms, Method, Rescaled
from dtrain.methods.method import Groups


def fit_of(method: Method, fit: Fit | None = None) -> Fit | None:
    """Return the fit that will run: the one given, or what the method asks for by itself, if it asks for one."""
    if fit is not None or method.needs != "objective":
        return fit
    if isinstance(method, Rescaled):
        return Search("tensor" if method.scope == "layer" else "model", method.search, method.masks)
    return Search()


def fit_scales(fit: Fit, problem: Problem) -> tuple[dict[str, Groups], dict[str, Any]]:
    """Return the payloads of every tensor with fitted scales, and a JSON-serialisable summary."""
    with torch.inference_mode(False), problem:  # what is made in it could have no part in a gradient
        factors, start, loss, notes = fit.run(problem)
        worse = start is not None and loss is not None and loss > start
        x = problem.start() if worse else factors
        summary: dict[str, Any] = {**fit.describe(), "kept": "start" if worse else "fit", **notes}
        if problem.objective is not None and loss is not None and start is not None:
            if not math.isfinite(min(start, loss)):
                raise InputError(
                    "the objective is NaN or infinite before the fit and after it. Check the model and the inputs."
                )
            # At 1/keep the model may overflow: JSON has no word for that.
            summary |= {"objective": problem.objective.label, "loss": min(start, loss)}
            summary["start"] = start if math.isfinite(start) else None
        return problem.scaled(x), {**summary, **_factors(problem, x)}


def _factors(problem: Problem, x: Factors) -> dict[str, list[float]]:
    """Return the least and the greatest factor of every scale of a tensor, by what it is called."""
    matrices = [value for name, value in x.items() if name in problem.matrices]
    if not matrices:
        return {}
    ranges = [
        [math.exp(extreme(float(extreme(value[group])) for value in matrices)) for extreme in (min, max)]
        for group in range(problem.groups)
    ]
    if isinstance(problem.method, Dbms):  # what is fixed is the method's own; a fitted one starts from 1
        own = [1.0 if value == "fit" else value for value in (problem.method.lam, problem.method.eta)]
        return {name: [o * v for v in r] for name, o, r in zip(("lam", "eta"), own, ranges, strict=True)}
    if isinstance(problem.method, Rescaled) and problem.method.q == "search":
        return {"q": [1 / ranges[0][1], 1 / ranges[0][0]]}
    return {"factors": ranges[0]}
