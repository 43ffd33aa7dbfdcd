"""Run the user's own validation, unchanged, from within a training run, and let it serve as an objective."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from typing_extensions import override

from dtrain.errors import InputError
from dtrain.fit import HiddenCapture

Mode = Literal["max", "min"]


def validate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    loaders: Any,
    *,
    batches: Any = 1.0,
    watch: pl.Callback | None = None,
) -> dict[str, float]:
    """Return what the module's own validation logs, with the weights it holds now.

    A private Trainer runs the loop: `trainer.validate()` would end the fit, and the callbacks, loggers and metrics of
    the run must not notice. Under DDP every rank validates its share of the data, and the results are averaged.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        loaders: Validation data loaders.
        batches: Batches to run of each loader, or their share as a float, as `limit_val_batches`.
        watch: A callback of the private trainer.
    """
    device = pl_module.device
    with _undisturbed(trainer, pl_module):
        inner = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=1 if device.type != "cuda" else [device.index or 0],
            precision=trainer.precision,
            limit_val_batches=batches,
            callbacks=[] if watch is None else [watch],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        inner.validate(pl_module, dataloaders=loaders, verbose=False)
        found = {name: float(value) for name, value in inner.callback_metrics.items()}
    return {name: _mean_over_ranks(trainer, value, device) for name, value in found.items()}


class ValidationObjective:
    """An objective made of the module's own validation step, run on training batches.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        target: The part of it that the delta belongs to.
        batches: How many training batches to look at.
        monitor: The metric to improve (q_v); None to keep the last hidden state instead (q_e).
        mode: "max" where more of the metric is better.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        target: nn.Module,
        batches: int,
        monitor: str | None = None,
        mode: Mode = "max",
    ) -> None:
        self.module, self.label = target, "hidden change" if monitor is None else f"{monitor} on training batches"
        self._trainer, self._pl_module, self._batches = trainer, pl_module, batches
        self._monitor, self._sign = monitor, -1.0 if mode == "max" else 1.0
        # Validation may have several loaders, and its step may ask which one a batch is from: each is given the same.
        loaders = cast("list[Any] | Any", trainer.val_dataloaders)
        count = len(cast("list[Any]", loaders)) if isinstance(loaders, list) else 1
        self._loaders = [calibration_loader(trainer, pl_module)] * count
        self._target: list[Tensor] = []

    def remember(self) -> None:
        """Cache the hidden states of the fine-tuned model."""
        if self._monitor is None:
            self._target = self._hidden()

    def loss(self) -> float:
        """Return the mean absolute change of the hidden state, or the metric, negated where more is better."""
        if self._monitor is not None:
            found = self._run(None)
            return self._sign * pick(found, self._monitor)
        hidden = self._hidden()
        total = sum(float((h - t).abs().double().sum()) for h, t in zip(hidden, self._target, strict=True))
        change = total / max(1, sum(t.numel() for t in self._target))
        return _mean_over_ranks(self._trainer, change, self._pl_module.device)

    def _hidden(self) -> list[Tensor]:
        watch = _Watch(self.module)
        self._run(watch)
        if not watch.seen:
            raise InputError(
                "no linear layer of the model ran in validation_step, so there is no hidden state to compare. "
                "Use DeltaCompressionCallback(fit_on='metric')."
            )
        return watch.seen

    def _run(self, watch: pl.Callback | None) -> dict[str, float]:
        return validate(self._trainer, self._pl_module, self._loaders, batches=self._batches, watch=watch)


class _Watch(pl.Callback):
    """Keeps the last hidden state of every batch."""

    def __init__(self, module: nn.Module) -> None:
        self._capture = HiddenCapture(module)
        self.seen: list[Tensor] = []

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._capture.__enter__()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._capture.__exit__()

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        if self._capture.last is not None:
            self.seen.append(self._capture.last.float())
        self._capture.last = None


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return training inputs in a fixed order.

    `calibration_dataloader()` of the data module or the module is asked first: it can leave augmentation out and hold
    data back. Else the training data set is read in its own order, through its own transforms.

    Raises:
        InputError: If there is neither.
    """
    for owner in (getattr(trainer, "datamodule", None), pl_module):
        if callable(make := getattr(owner, "calibration_dataloader", None)):
            return make()
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader):
        raise InputError(
            f"the training data is a {type(loader).__name__}, not one DataLoader, so the fit cannot choose its inputs. "
            "Define calibration_dataloader() on the LightningModule or the LightningDataModule."
        )
    typed = cast("DataLoader[Any]", loader)
    if isinstance(typed.dataset, IterableDataset):
        return typed
    return DataLoader(typed.dataset, batch_size=typed.batch_size or 32, shuffle=False, collate_fn=typed.collate_fn)


def pick(found: dict[str, float], monitor: str) -> float:
    """Return the metric called `monitor`.

    Raises:
        InputError: If validation does not log it; the names it logs are listed.
    """
    if monitor not in found:
        listed = ", ".join(sorted(found)) or "nothing"
        raise InputError(f"validation logs {listed}, but `monitor` is {monitor!r}. Use one of these names.")
    return found[monitor]


@contextmanager
def _undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Generator[None]:
    """Put back what a second Trainer changes on a module, and keep that Trainer quiet."""
    device, modes = pl_module.device, {module: module.training for module in pl_module.modules()}
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    # Callbacks that the module brings along belong to the run, not to this look at it.
    pl_module.configure_callbacks = lambda: []  # type: ignore[method-assign]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run has shown all there is to say about its loaders
            yield
    finally:
        del pl_module.configure_callbacks
        logger.setLevel(level)
        pl_module.trainer = trainer
        pl_module.to(device)
        for module, mode in modes.items():
            module.training = mode


def _mean_over_ranks(trainer: pl.Trainer, value: float, device: torch.device) -> float:
    reduced = trainer.strategy.reduce(torch.tensor(value, dtype=torch.float64, device=device), reduce_op="mean")
    return float(reduced)
