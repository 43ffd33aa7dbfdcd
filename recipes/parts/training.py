"""What the recipes' fine-tunings have in common: one optimizer, and steps that a resumed run repeats."""

import os
from typing import Any

import lightning as L
import torch

from dtrain.errors import InputError


def seed_batch(module: L.LightningModule, batch_idx: int) -> None:
    """Let augmentation and dropout follow from seed, epoch and batch alone, so a resumed run equals an unbroken one."""
    seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
    torch.manual_seed(seed + 1_000_003 * (1 + module.current_epoch) + batch_idx)


def warmup_then_cosine(module: L.LightningModule, lr: float) -> dict[str, Any]:
    """Return AdamW with a rate that warms up over a tenth of the steps and falls as a cosine.

    There is no weight decay: it pulls to zero, AdamR to the base, and one of them is enough.
    """
    optimizer = torch.optim.AdamW((p for p in module.parameters() if p.requires_grad), lr=lr, weight_decay=0.0)
    planned = module.trainer.estimated_stepping_batches
    if planned == float("inf"):
        raise InputError("the learning rate follows the length of the run. Give --trainer.max_steps or max_epochs.")
    steps = max(3, int(planned))
    warmup = max(0.1, 2 / steps)  # neither part may be empty, in however short a run
    schedule = OneCycle(optimizer, lr, total_steps=steps, pct_start=warmup)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """Goes on with the length of the run that is now: one that was over may be resumed for longer."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = {name: vars(self)[name] for name in ("total_steps", "_schedule_phases")}
        super().load_state_dict({**state_dict, **own})


class OrderOfEpoch(L.Callback):
    """Gives a sampler the epoch that a run is in: Lightning counts one more if a run with `max_steps` is resumed."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        sampler = trainer.train_dataloader.sampler
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(trainer.current_epoch)


class ValidateAtLast(L.Callback):
    """Validates at the last step of a run that ends within its first epoch: its checkpoints have a score to go by."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        last = trainer.max_steps * trainer.accumulate_grad_batches
        if trainer.val_check_batch is not None and 0 < last < trainer.val_check_batch:  # None: by the clock
            trainer.val_check_batch = last
