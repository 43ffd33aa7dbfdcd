"""Let the user's own validation step say how good a candidate is, on training inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any, Literal, NamedTuple, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, Subset
from typing_extensions import override

from dtrain.callbacks.evaluation import mean_over_ranks, validate
from dtrain.callbacks.replay import record
from dtrain.errors import InputError
from dtrain.fit import Calibration, HiddenCapture, HiddenChange, LogitChange, Objective, mean_change

Mode = Literal["max", "min"]
Aim = Literal["hidden", "logits", "metric"]


class ValidationObjective:
    """An objective made of the module's own validation step, run on training batches.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        target: The part of it that the delta belongs to.
        loader: Gives the training batches.
        batches: How many of them to look at.
        monitor: The metric to improve (q_v); None to keep the last hidden state instead (q_e).
        mode: "max" where more of the metric is better.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        target: nn.Module,
        loader: Any,
        batches: int,
        monitor: str | None = None,
        mode: Mode = "max",
    ) -> None:
        self.module, self.label = target, "hidden change" if monitor is None else f"{monitor} on training batches"
        self._trainer, self._pl_module, self._batches = trainer, pl_module, batches
        self._monitor, self._sign = monitor, -1.0 if mode == "max" else 1.0
        self._loader = loader
        self._target: list[Tensor] = []

    def remember(self) -> None:
        """Cache the hidden states of the fine-tuned model."""
        if self._monitor is None:
            self._target = self._hidden()

    def loss(self) -> float:
        """Return the mean absolute change of the hidden state, or the metric, negated where more is better."""
        if self._monitor is not None:
            return self._sign * pick(self._run(None), self._monitor)
        hidden = self._hidden()
        return mean_over_ranks(self._trainer, {"change": mean_change(hidden, self._target)})["change"]

    def _hidden(self) -> list[Tensor]:
        # Compiled code was traced without the hooks that capture the hidden state.
        with HiddenCapture(self.module) as capture, torch.compiler.set_stance("force_eager"):
            watch = _Watch(capture)
            self._run(watch)
        if not watch.seen:
            raise InputError(
                "no linear layer of the model ran in validation_step, so there is no hidden state to compare. "
                "Use DeltaCompressionCallback(fit_on='metric')."
            )
        return watch.seen

    def _run(self, watch: pl.Callback | None) -> dict[str, float]:
        return validate(self._trainer, self._pl_module, instead=self._loader, batches=self._batches, watch=watch)


class _Watch(pl.Callback):
    """Keeps the last hidden state of every batch."""

    def __init__(self, capture: HiddenCapture) -> None:
        self._capture = capture
        self.seen: list[Tensor] = []

    @override
    def on_validation_batch_end(self, *_: Any, **__: Any) -> None:
        """Called when a validation batch ends: keep its hidden state."""
        if self._capture.last is not None:
            self.seen.append(self._capture.last.float())
        self._capture.last = None


class FitOn(NamedTuple):
    """What scales are fitted to.

    Args:
        what: "hidden", "logits" or "metric".
        monitor: The metric.
        mode: "max" where more of it is better.
        learns: Whether the fit needs gradients.
    """

    what: Aim
    monitor: str | None
    mode: Mode
    learns: bool


def training_objective(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module, batches: int, aim: FitOn
) -> Objective:
    """Return an objective on training batches (a collective).

    The model is called again as the validation step has called it once; where that cannot be, the step itself is run
    for every evaluation.

    Raises:
        InputError: If there would have to be gradients or logits, and the model cannot be called again.
    """
    loader = calibration_loader(trainer, pl_module)
    monitor = aim.monitor if aim.what == "metric" else None
    if monitor is None:
        replay = record(trainer, pl_module, target, loader, batches)
        if replay is not None:
            return (HiddenChange if aim.what == "hidden" else LogitChange)(target, *replay)
        if aim.learns or aim.what == "logits":
            raise InputError(
                f"validation_step calls no part of {type(target).__name__}, or several one after the other, so there "
                "is no forward pass to learn from. Let it call one module, such as `self(x)`, and name that one in "
                "DeltaCompressionCallback(module=...); or use fit_on='metric' with fit=Search()."
            )
    return ValidationObjective(trainer, pl_module, target, loader, batches, monitor, aim.mode)


def validation_calibration(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module, batches: int
) -> Calibration:
    """Return a calibration that runs the module's own validation step on `batches` training batches.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        target: The part of it that the delta belongs to.
        batches: How many training batches to look at.
    """
    return Calibration(
        target,
        [calibration_loader(trainer, pl_module)],
        lambda _, loader: validate(trainer, pl_module, instead=loader, batches=batches),
    )


def check_one_process(trainer: pl.Trainer, who: object) -> None:
    """Refuse a method or a fit that looks at inputs where every process would see others and make another delta.

    Raises:
        InputError: If the run has more than one process.
    """
    if trainer.world_size > 1:
        raise InputError(
            f"{type(who).__name__} measures the inputs of layers, which differ between the {trainer.world_size} "
            "processes of this run. Train on one device, or compress the checkpoint afterwards with dtrain.compress."
        )


def check_calibration(trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
    """Raise what `calibration_loader` would raise, before the first step and without building anything."""
    if _own_calibration(trainer, pl_module) is None and not isinstance(trainer.train_dataloader, DataLoader):
        raise InputError(
            f"the training data is a {type(trainer.train_dataloader).__name__}, not one DataLoader, so the fit cannot "
            "choose its inputs. Define calibration_dataloader() on the LightningModule or the LightningDataModule."
        )


def calibration_loader(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
    """Return training inputs in a fixed order.

    `calibration_dataloader()` of the data module or the module is asked first: it can leave augmentation out and hold
    data back. Else the training data set is read through its own transforms, in an order shuffled once and for all: it
    may be sorted by class.

    Raises:
        InputError: If there is neither.
    """
    check_calibration(trainer, pl_module)
    if (make := _own_calibration(trainer, pl_module)) is not None:
        return make()
    rank_zero_info(
        "DeltaCompressionCallback looks at the training data set as it is, with the augmentation its transforms do. "
        "Define calibration_dataloader() on the LightningModule or the data module to choose other inputs."
    )
    typed = cast("DataLoader[Any]", trainer.train_dataloader)
    if isinstance(typed.dataset, IterableDataset):
        return typed
    batched = typed.batch_sampler is not None  # where it is not, each item of the data set is a batch already
    size = (
        (typed.batch_size or getattr(cast("object", typed.batch_sampler), "batch_size", None) or 32)
        if batched
        else None
    )
    order = torch.randperm(len(cast("Sized", typed.dataset)), generator=torch.Generator().manual_seed(0))
    return DataLoader(
        Subset(typed.dataset, cast("list[int]", order.tolist())),
        batch_size=size,
        shuffle=False,
        collate_fn=typed.collate_fn,
    )


def goal(trainer: pl.Trainer, monitor: str | None, mode: Mode | None) -> tuple[str | None, Mode]:
    """Return the metric that counts and its direction: what is not set is taken from the checkpoint callback."""
    theirs = cast("str | None", getattr(trainer.checkpoint_callback, "monitor", None))
    monitor = monitor or theirs
    if mode is None and monitor is not None and monitor == theirs:
        mode = cast("Mode", getattr(trainer.checkpoint_callback, "mode", "max"))
    return monitor, mode or "max"


def pick(found: dict[str, float], monitor: str) -> float:
    """Return the metric called `monitor`.

    Raises:
        InputError: If validation does not log it; the names it logs are listed.
    """
    if monitor not in found:
        raise InputError(missing_metric(found, monitor))
    return found[monitor]


def missing_metric(found: Iterable[str], monitor: str) -> str:
    """Return the sentence about a metric that validation does not log, with the names of those it does."""
    listed = ", ".join(sorted(found)) or "nothing"
    return f"validation logs {listed}, but `monitor` is {monitor!r}. Use one of these names."


def _own_calibration(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[], Any] | None:
    owners = (getattr(trainer, "datamodule", None), pl_module)
    methods = [getattr(owner, "calibration_dataloader", None) for owner in owners]
    return next((method for method in methods if callable(method)), None)
