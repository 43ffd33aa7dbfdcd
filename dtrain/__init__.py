"""Fine-tune with Lightning, ship the delta.

Names are imported when they are first used, so that `dtrain --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_HOME = {
    "compression": ("compress",),
    "delta": ("Delta", "load"),
    "errors": (
        "AppliedStateError",
        "ArtifactError",
        "BaseMismatchError",
        "DtrainError",
        "InputError",
        "NeedsDataError",
    ),
    "fit": ("HiddenChange", "Metric", "Objective"),
    "methods": ("METHODS", "Dare", "DareX", "Lossless", "Method"),
    "optim": ("AdamR",),
    "rules": ("Rules",),
    "weights": ("Weights", "read_weights"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

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


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dtrain.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
