"""Fine-tune with Lightning, ship the delta.

Names are imported when they are first used, so that `dtrain --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.advice import Advice, advise
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
    from dtrain.fit import Calibration, ClosedForm, Fit, HiddenChange, Learn, LogitChange, Metric, Objective, Search
    from dtrain.lora import lora_factors, lora_product, save_adapter
    from dtrain.methods import (
        METHODS,
        BitDelta,
        ComPEFT,
        Dare,
        DareX,
        Dbms,
        DeltaCoMe,
        DeltaDCT,
        DeltaDQ,
        Ecsq,
        EoRA,
        ImPart,
        Inputs,
        Lossless,
        Magnitude,
        Method,
        SeededSign,
        Structured,
        UltraDelta,
        Wanda,
    )
    from dtrain.optim import AdamR
    from dtrain.rules import Rules
    from dtrain.shared import shared_base
    from dtrain.weights import Weights, read_weights

__version__ = "0.1.0"

_HOME = {
    "advice": ("Advice", "advise"),
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
    "fit": (
        "Calibration",
        "ClosedForm",
        "Fit",
        "HiddenChange",
        "Learn",
        "LogitChange",
        "Metric",
        "Objective",
        "Search",
    ),
    "lora": ("lora_factors", "lora_product", "save_adapter"),
    "methods": (
        "METHODS",
        "BitDelta",
        "ComPEFT",
        "Dare",
        "DareX",
        "Dbms",
        "DeltaCoMe",
        "DeltaDCT",
        "DeltaDQ",
        "Ecsq",
        "EoRA",
        "ImPart",
        "Inputs",
        "Lossless",
        "Magnitude",
        "Method",
        "SeededSign",
        "Structured",
        "UltraDelta",
        "Wanda",
    ),
    "optim": ("AdamR",),
    "rules": ("Rules",),
    "shared": ("shared_base",),
    "weights": ("Weights", "read_weights"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "METHODS",
    "AdamR",
    "Advice",
    "AppliedStateError",
    "ArtifactError",
    "BaseMismatchError",
    "BitDelta",
    "Calibration",
    "ClosedForm",
    "ComPEFT",
    "Dare",
    "DareX",
    "Dbms",
    "Delta",
    "DeltaCoMe",
    "DeltaDCT",
    "DeltaDQ",
    "DtrainError",
    "Ecsq",
    "EoRA",
    "Fit",
    "HiddenChange",
    "ImPart",
    "InputError",
    "Inputs",
    "Learn",
    "LogitChange",
    "Lossless",
    "Magnitude",
    "Method",
    "Metric",
    "NeedsDataError",
    "Objective",
    "Rules",
    "Search",
    "SeededSign",
    "Structured",
    "UltraDelta",
    "Wanda",
    "Weights",
    "advise",
    "compress",
    "load",
    "lora_factors",
    "lora_product",
    "read_weights",
    "save_adapter",
    "shared_base",
]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dtrain.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
