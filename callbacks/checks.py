"""Refuse before training what cannot work after it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl

from dtrain.callbacks.evaluation import lightning_of
from dtrain.delta import load
from dtrain.errors import InputError
from dtrain.fit import Fit, Learn
from dtrain.methods import Dbms, Method

#: Callbacks that put other weights into the module when training ends.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


def check_choices(**given: tuple[object, Sequence[object]]) -> None:
    """Raise an InputError about the first argument whose value is not among those allowed."""
    for name, (value, allowed) in given.items():
        if value not in allowed:
            raise InputError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_path(path: str | Path | None) -> None:
    """Raise an InputError if no file can be written to `path`."""
    if path is None:
        return
    if Path(path).is_dir():
        raise InputError(
            f"`path` is the folder {path}. Give the name of a file, such as {Path(path) / 'delta'}.safetensors."
        )
    folder = next(parent for parent in Path(path).absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise InputError(f"{folder} cannot be written to, so there can be no {path}. Give another `path`.")


def check_fit(method: Method, fit: Fit | None, fit_on: str, batches: int, shared: str | Path | None) -> None:
    """Raise an InputError if a method and a fit cannot do with what they are given."""
    if fit is not None and method.bitwise:
        raise InputError(f"{type(method).__name__} has no scales to fit. Leave `fit` out, or use a lossy method.")
    if isinstance(fit, Learn) and fit_on == "metric":
        raise InputError(
            "Learn follows a gradient, and a metric has none. Use fit_on='hidden', or fit=dtrain.Search()."
        )
    if isinstance(fit, Learn) and batches < 2:
        raise InputError("Learn learns from some batches and stops by others. Give calibration_batches=2 or more.")
    if shared is None and isinstance(method, Dbms) and method.source == "shared":
        raise InputError(
            "Dbms(source='shared') got no base vector. Make one with dtrain.shared_base(base, finetunes, method), save "
            "it, and give DeltaCompressionCallback(shared=...) its path."
        )


def check_shared(shared: str | Path | None) -> None:
    """Raise what keeps the file of a base vector from being read."""
    if shared is not None:
        load(shared)


def check_validation_step(pl_module: pl.LightningModule) -> None:
    """Raise an InputError if a module has none."""
    plain = lightning_of(pl_module).LightningModule
    if type(pl_module).validation_step is plain.validation_step:
        raise InputError(
            f"scales are fitted with the module's own validation_step, and {type(pl_module).__name__} has none. Define "
            "it, or choose a method that needs no data, such as DareX(q='norm')."
        )


def check_callbacks(callback: pl.Callback, trainer: pl.Trainer, source: str) -> None:
    """Raise an InputError if the other callbacks do not give the weights that `source` asks for."""
    if source == "best":  # what is averaged when training ends is in no checkpoint, so the order does not matter
        if trainer.checkpoint_callback is None and not cast("Any", trainer).fast_dev_run:  # which takes it out
            raise InputError(
                "source='best' needs a checkpoint callback. Add ModelCheckpoint(monitor=...) or use 'last'."
            )
        return
    callbacks = cast("list[pl.Callback]", cast("Any", trainer).callbacks)
    later = callbacks[callbacks.index(callback) + 1 :]
    names = [parent.__name__ for other in later for parent in type(other).__mro__]
    if found := [name for name in _AVERAGING if name in names]:
        raise InputError(
            f"{found[0]} puts averaged weights into the module when training ends, after DeltaCompressionCallback has "
            f"compressed the others. Put DeltaCompressionCallback behind {found[0]} in `callbacks`."
        )
