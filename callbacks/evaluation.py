"""Run the user's own validation, unchanged, from within a training run."""

from __future__ import annotations

import copy
import importlib
import tempfile
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import nn

from dtrain.callbacks.live import load_weights
from dtrain.callbacks.undisturbed import undisturbed
from dtrain.delta import Delta
from dtrain.weights import Weights


def validate(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    *,
    instead: Any = None,
    batches: int | float = 1.0,
    watch: pl.Callback | None = None,
) -> dict[str, float]:
    """Return what the module's own validation logs, with the weights it holds now.

    A private Trainer runs the loop: `trainer.validate()` would end the fit, and the callbacks, loggers and metrics of
    the run must not notice. To the module it looks like the run's own: the same devices and precision, epoch, step and
    optimizers, and as many loggers, which write nothing. Under DDP every rank validates its share of the data, and what
    the module does not reduce itself is averaged.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        instead: A data loader to be used in the place of each validation loader of the run.
        batches: Batches to run of each loader, or their share as a float, as `limit_val_batches`.
        watch: A callback of the private trainer.
    """
    lightning = lightning_of(pl_module)
    with undisturbed(pl_module, lightning.LightningModule), tempfile.TemporaryDirectory() as folder:
        inner = lightning.Trainer(
            accelerator=trainer.accelerator,
            devices=[trainer.strategy.root_device.index or 0] if trainer.strategy.root_device.type == "cuda" else 1,
            strategy=_inside(lightning, trainer),
            # The named environment keeps SLURM's out, which would requeue the job for this trainer as well.
            plugins=[trainer.precision_plugin, _environment(lightning)],
            inference_mode=trainer.validate_loop.inference_mode,
            limit_val_batches=batches,
            logger=[_mute(lightning, folder) for _ in trainer.loggers] or False,
            default_root_dir=folder,  # what a module writes into the log folder would overwrite the run's
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_autolog_hparams=False,
            use_distributed_sampler=False,  # the run's loaders have theirs
        )
        # Set afterwards: a Trainer adds the callbacks of installed packages, which belong to the run.
        inner.callbacks = [] if watch is None else [watch]
        try:
            data = _data(lightning, trainer, _loaders(trainer, instead))
            inner.validate(pl_module, datamodule=data, verbose=False)
        except SystemExit as error:
            # A Trainer turns Ctrl-C into an exit, but it is the run that has to be shut down in order.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None
            raise
        return mean_over_ranks(trainer, {name: float(value) for name, value in inner.callback_metrics.items()})


def measure(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module, base: Weights, tuned: Weights, delta: Delta
) -> dict[str, dict[str, float]]:
    """Return what validation logs for the "base", "finetuned" and "compressed" model; nothing without such data.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        target: The part of it that the delta belongs to; it is left with other weights.
        base: Weights that the fine-tuning started from.
        tuned: Those it ended with.
        delta: The compressed difference.
    """
    if not has_validation(trainer):
        rank_zero_warn("DeltaCompressionCallback: the run has no validation data, so no score is measured.")
        return {}
    # In this order, each finds what it lacks: the base and the delta to it may be without the fresh head.
    models = {"finetuned": tuned.tensors, "base": base.tensors, "compressed": delta.state_dict(base)}
    scores: dict[str, dict[str, float]] = {}
    for who, tensors in models.items():
        load_weights(target, tensors)
        scores[who] = validate(trainer, pl_module, batches=trainer.limit_val_batches)
    return {who: scores[who] for who in ("base", "finetuned", "compressed")}


def has_validation(trainer: pl.Trainer) -> bool:
    """Return whether the run has validation data."""
    loaders: object = trainer.val_dataloaders
    return loaders is not None and loaders != []


def mean_over_ranks(trainer: pl.Trainer, values: dict[str, float]) -> dict[str, float]:
    """Return the mean of each value over the ranks that have it, by the names that rank 0 knows."""
    if trainer.world_size == 1:
        return values
    names = trainer.strategy.broadcast(sorted(values))
    table = [[values.get(name, 0.0), float(name in values)] for name in names]
    local = torch.tensor(table, dtype=torch.float64, device=trainer.strategy.root_device).reshape(-1, 2)
    total = cast("list[list[float]]", trainer.strategy.reduce(local, reduce_op="sum").tolist())
    return {name: value / count for name, (value, count) in zip(names, total, strict=True)}


def lightning_of(pl_module: nn.Module) -> Any:
    """Return the package a module's Trainer must come from: `lightning.pytorch` and `pytorch_lightning` are two."""
    for parent in type(pl_module).__mro__:
        root = parent.__module__.removesuffix(".core.module")
        if parent.__name__ == "LightningModule" and root != parent.__module__:
            return importlib.import_module(root)
    return pl


class _Inside:
    """What a strategy does differently for a module that another trainer owns.

    The module stays where it is: the usual strategy moves it to its device and, when done, to the CPU, and whoever
    holds its tensors would be left with the old memory.
    """

    outer: Any

    def setup_environment(self) -> None:
        """Do nothing: the devices are set up."""

    def setup(self, trainer: Any) -> None:
        """Let epoch, step and limits be those of the run. Not earlier: attaching data resets the loops."""
        trainer.fit_loop = self.outer.fit_loop

    def teardown(self) -> None:
        """Do nothing: the run goes on."""

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the run's first rank."""
        return self.outer.strategy.is_global_zero

    def reduce(self, *arguments: Any, **options: Any) -> Any:
        """Reduce over the ranks of the run."""
        return self.outer.strategy.reduce(*arguments, **options)

    def all_gather(self, *arguments: Any, **options: Any) -> Any:
        """Gather from the ranks of the run."""
        return self.outer.strategy.all_gather(*arguments, **options)

    def barrier(self, *arguments: Any, **options: Any) -> None:
        """Wait for the ranks of the run."""
        self.outer.strategy.barrier(*arguments, **options)

    def broadcast(self, *arguments: Any, **options: Any) -> Any:
        """Broadcast to the ranks of the run."""
        return self.outer.strategy.broadcast(*arguments, **options)


def _inside(lightning: Any, trainer: pl.Trainer) -> Any:
    made: Any = type("Inside", (_Inside, lightning.strategies.SingleDeviceStrategy), {})
    strategy = made(device=trainer.strategy.root_device)
    strategy.outer = trainer
    for name in ("global_rank", "local_rank", "node_rank", "world_size"):
        setattr(strategy, name, getattr(trainer, name))
    strategy.optimizers = trainer.optimizers
    strategy.lr_scheduler_configs = trainer.strategy.lr_scheduler_configs
    return strategy


def _environment(lightning: Any) -> Any:
    """Return the environment class of the same family: Trainers tell their plugins by type."""
    if lightning is pl:
        return LightningEnvironment()
    return importlib.import_module("lightning_fabric.plugins.environments").LightningEnvironment()


def _mute(lightning: Any, folder: str) -> Any:
    """Return a logger that takes every call and does nothing, so that `self.logger.experiment` works as in the run."""
    places: dict[str, Any] = dict.fromkeys(("save_dir", "log_dir", "root_dir"), property(lambda _: folder))
    return type("Mute", (lightning.loggers.logger.DummyLogger,), places)()


def _loaders(trainer: pl.Trainer, instead: Any) -> CombinedLoader:
    """Return the run's validation loaders, to be iterated anew, or `instead` in the place of each."""
    # `trainer.val_dataloaders` does not say how several loaders are combined.
    found = cast("Any", trainer).fit_loop.epoch_loop.val_loop._combined_loader
    if found is None or not found.flattened:
        return CombinedLoader(instead, "sequential")
    loaders = type(found)(found.iterables, found._mode)
    if instead is not None:  # in the place of each: the step may ask which one a batch is from
        loaders.flattened = [instead] * len(loaders.flattened)
    return loaders


def _data(lightning: Any, trainer: pl.Trainer, loaders: CombinedLoader) -> Any:
    """Return a data module that gives `loaders`, with the batch hooks of the run's own data module, if it has one.

    A shallow copy: it gets the private trainer, so `self.trainer.training` is false in its hooks, and the run's own
    data module never notices.
    """
    plain = lightning.LightningDataModule
    own = getattr(trainer, "datamodule", None)
    data: Any = plain() if own is None else copy.copy(own)
    for hook in ("prepare_data", "setup", "teardown", "on_exception"):
        setattr(data, hook, getattr(plain, hook).__get__(data))  # the data is there already
    data.val_dataloader = lambda: loaders
    return data
