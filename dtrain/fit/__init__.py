"""Fit the few scalars that stay free after encoding, on training inputs only."""

from dtrain.fit.attention import calibrate
from dtrain.fit.calibration import Calibration
from dtrain.fit.closed_form import ClosedForm
from dtrain.fit.fit import Fit, Found
from dtrain.fit.learn import Learn
from dtrain.fit.objective import (
    Differentiable,
    HiddenCapture,
    HiddenChange,
    LogitChange,
    Metric,
    Objective,
    OutputChange,
    mean_change,
)
from dtrain.fit.problem import Problem, Watch
from dtrain.fit.scales import fit_of, fit_scales
from dtrain.fit.search import Search

#: Every fit, in the order in which they are listed.
FITS: tuple[type[Fit], ...] = (ClosedForm, Search, Learn)

__all__ = [
    "FITS",
    "Calibration",
    "ClosedForm",
    "Differentiable",
    "Fit",
    "Found",
    "HiddenCapture",
    "HiddenChange",
    "Learn",
    "LogitChange",
    "Metric",
    "Objective",
    "OutputChange",
    "Problem",
    "Search",
    "Watch",
    "calibrate",
    "fit_of",
    "fit_scales",
    "mean_change",
]
