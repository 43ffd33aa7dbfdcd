"""Fit the few scalars that stay free after encoding, on training inputs only."""

from dtrain.fit.objective import HiddenCapture, HiddenChange, Metric, Objective
from dtrain.fit.search import QFit, search_q

__all__ = ["HiddenCapture", "HiddenChange", "Metric", "Objective", "QFit", "search_q"]
