"""Which strategies the callbacks refuse."""

from __future__ import annotations

import lightning.pytorch as pl

from dtrain.errors import InputError

_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def refuse_sharded(trainer: pl.Trainer, who: str, why: str) -> None:
    """Raise an InputError that says why `who` does not work where a process has only a part of the parameters."""
    # By name: pytorch_lightning and lightning.pytorch each have their own classes.
    for parent in type(trainer.strategy).__mro__:
        if parent.__name__ in _SHARDED:
            raise InputError(
                f"{who} does not work with {parent.__name__} yet: {why}. Train on one device or with strategy='ddp'."
            )
