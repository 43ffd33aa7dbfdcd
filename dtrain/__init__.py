"""Fine-tune with Lightning, ship the delta."""

from dtrain.compression import compress
from dtrain.delta import Delta, load
from dtrain.errors import (
    AppliedStateError,
    ArtifactError,
    BaseMismatchError,
    DtrainError,
    InputError,
    NeedsDataError,
)
from dtrain.fit import HiddenChange, Metric, Objective
from dtrain.methods import METHODS, Dare, DareX, Lossless, Method
from dtrain.optim import AdamR
from dtrain.rules import Rules
from dtrain.weights import Weights, read_weights

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "AdamR",
    "AppliedStateError",
    "ArtifactError",
    "BaseMismatchError",
    "Dare",
    "DareX",
    "Delta",
    "DtrainError",
    "HiddenChange",
    "InputError",
    "Lossless",
    "Method",
    "Metric",
    "NeedsDataError",
    "Objective",
    "Rules",
    "Weights",
    "compress",
    "load",
    "read_weights",
]
