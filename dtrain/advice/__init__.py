"""Advice: measure a delta, and say which method suits it and why."""

from dtrain.advice.advice import Advice, advise
from dtrain.advice.chart import Step
from dtrain.advice.choices import Choice
from dtrain.advice.measure import Measures, TensorMeasures
from dtrain.advice.sizes import Expected, RoleSize, Sizes
from dtrain.advice.spectrum import Spectrum

__all__ = [
    "Advice",
    "Choice",
    "Expected",
    "Measures",
    "RoleSize",
    "Sizes",
    "Spectrum",
    "Step",
    "TensorMeasures",
    "advise",
]
