"""Fit the few scalars that stay free after encoding, on training inputs only."""

from dtrain.fit.attention import calibrate
from dtrain.fit.calibration import Calibration
from dtrain.fit.objective import HiddenCapture, HiddenChange, Metric, Objective, mean_change
from dtrain.fit.search import QFit, search_q

__all__ = [
    "Calibration",
    "HiddenCapture",
    "HiddenChange",
    "Metric",
    "Objective",
    "QFit",
    "calibrate",
    "mean_change",
    "search_q",
]
