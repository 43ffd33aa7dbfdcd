"""Compress a run that is over once more: with another method, another keep rate, another fit, and no training."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from typing_extensions import override

from dtrain.callbacks.compression import DeltaCompressionCallback
from dtrain.errors import InputError


def compress_finished(
    trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: str | Path | None = None, **data: Any
) -> None:
    """Do what `DeltaCompressionCallback` does when training ends, for a run that ended before.

    The run is resumed and stopped before its next step: what needs training data finds it, the table is printed and the
    loggers get their values as ever. The weights and the checkpoints of the run stay as they are.

    Example::

        callback = DeltaCompressionCallback(dtrain.SeededSign(keep=0.03), "smaller.safetensors", monitor="val_acc")
        compress_finished(L.Trainer(callbacks=[callback]), module, "last.ckpt", datamodule=data)

    Args:
        trainer: Has the callback. How long it would train does not matter.
        pl_module: The module.
        checkpoint: The last one of the run, which knows the base; None if `pl_module` holds the fine-tuned weights
            already: then give the callback the `base`.
        data: As for `trainer.fit`.

    Raises:
        InputError: If there is no such checkpoint, or nothing says what the base is.
    """
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise InputError(f"there is no checkpoint {checkpoint}. Give the last one that the run has saved.")
    callbacks = cast("list[pl.Callback]", cast("Any", trainer).callbacks)
    compressing = [callback for callback in callbacks if isinstance(callback, DeltaCompressionCallback)]
    if not compressing:
        raise InputError("the Trainer has no DeltaCompressionCallback, which says how to compress. Add one.")
    if checkpoint is None and any(callback.base is None for callback in compressing):
        raise InputError(
            "without a checkpoint nothing says what the fine-tuning started from. Give DeltaCompressionCallback("
            "base=...) those weights."
        )
    with _without_saving(trainer), _same_limits(trainer), _with(trainer, _BeforeNextStep()):
        trainer.fit(pl_module, ckpt_path=None if checkpoint is None else str(checkpoint), **data)


class _BeforeNextStep(pl.Callback):
    """Ends a training before its next step, however long it was to be."""

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when the optimizers are made, whose schedules follow from the limits: now these can go.

        A run that has reached one of them would be skipped, and no callback would learn that it has ended.
        """
        loop = cast("Any", trainer.fit_loop)
        loop.max_epochs = loop.epoch_loop.max_steps = -1
        loop.min_epochs = loop.epoch_loop.min_steps = None
        trainer.check_val_every_n_epoch = 1  # the validation data are made ready only if an epoch ends with them

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: it has begun, so it will end."""
        trainer.should_stop = True


@contextmanager
def _with(trainer: pl.Trainer, callback: pl.Callback) -> Generator[None]:
    callbacks = cast("list[pl.Callback]", cast("Any", trainer).callbacks)
    callbacks.insert(0, callback)
    try:
        yield
    finally:
        callbacks.remove(callback)


@contextmanager
def _same_limits(trainer: pl.Trainer) -> Generator[None]:
    """A context that leaves the trainer with the limits it had: it may go on with the training."""
    loop = cast("Any", trainer.fit_loop)
    held = [(loop, "max_epochs"), (loop, "min_epochs"), (loop.epoch_loop, "max_steps"), (loop.epoch_loop, "min_steps")]
    held.append((trainer, "check_val_every_n_epoch"))
    before = [getattr(holder, name) for holder, name in held]
    try:
        yield
    finally:
        for (holder, name), value in zip(held, before, strict=True):
            setattr(holder, name, value)


@contextmanager
def _without_saving(trainer: pl.Trainer) -> Generator[None]:
    """A context in which no checkpoint is saved when training ends: the run has its last one."""
    savers = cast("list[Any]", trainer.checkpoint_callbacks)
    before = [getattr(saver, "save_last", None) for saver in savers]
    for saver in savers:
        saver.save_last = False
    try:
        yield
    finally:
        for saver, value in zip(savers, before, strict=True):
            saver.save_last = value
