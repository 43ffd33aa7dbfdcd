"""Look at a module in the middle of a run, and leave no trace on it."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

#: Set-up belongs to the run: a module may build its layers in these hooks.
_SETUP_HOOKS = ("prepare_data", "setup", "configure_model", "configure_callbacks", "teardown")
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric")


@contextmanager
def undisturbed(pl_module: pl.LightningModule, plain: type[pl.LightningModule]) -> Generator[None]:
    """A context in which a second Trainer may use a module that is part of a run.

    Afterwards everything but the weights is as it was: train and eval modes, the trainer, gradients, metric states,
    what the module's hooks have noted in attributes and lists, and the random number generators. They start from the
    same seed each time, so that every look sees the same random numbers, on a resumed run as well.

    Args:
        pl_module: The module. Its set-up hooks do nothing within the context.
        plain: The class whose set-up hooks do nothing: LightningModule.
    """
    before = {module: _remember(vars(module)) for module in pl_module.modules()}
    vars(pl_module).update({hook: getattr(plain, hook).__get__(pl_module) for hook in _SETUP_HOOKS})
    vars(pl_module)["zero_grad"] = lambda *_, **__: None  # type: ignore[misc]  # any signature
    try:
        with same_numbers(), _silent():
            yield
    finally:
        for module, attributes in before.items():
            _restore(module, attributes)


@contextmanager
def same_numbers() -> Generator[None]:
    """A context in which random numbers start from the same seed each time, and after which they go on as before."""
    with isolate_rng():
        _seed()
        yield


@contextmanager
def _silent() -> Generator[None]:
    """Hush Lightning: the run has said all there is to say about its devices and loaders."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  # the generator that other people's transforms draw from


def _remember(attributes: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return every attribute with a copy of what it holds: `metric.update` adds in place, hooks append to lists."""
    return {name: (value, _copy(value)) for name, value in attributes.items()}


def _copy(value: object) -> object:
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        return value.detach().clone()
    return copy.copy(cast("Any", value)) if isinstance(value, (list, dict, set, deque)) else value


@torch.inference_mode()  # states that were made in it can be written to only in it
def _restore(module: nn.Module, attributes: Mapping[str, tuple[Any, Any]]) -> None:
    """Put the same objects back with the same content: metrics of a collection share their states."""
    for value, content in attributes.values():
        _refill(value, content)
    vars(module).clear()
    vars(module).update({name: value for name, (value, _) in attributes.items()})


def _refill(value: Any, content: Any) -> None:
    if value is content:
        return
    if isinstance(value, Tensor):
        if not torch.equal(value, content):
            value.copy_(content)
    elif isinstance(value, (dict, set)):
        held = cast("dict[Any, Any] | set[Any]", value)
        held.clear()
        held.update(content)
    else:
        held = cast("list[Any] | deque[Any]", value)
        held.clear()
        held.extend(content)
