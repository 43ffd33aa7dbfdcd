"""Compress the delta when training ends, and measure what that costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich.console import Console
from torch import Tensor, nn
from typing_extensions import override

from dtrain.callbacks.evaluation import Mode, ValidationObjective, pick, validate
from dtrain.callbacks.snapshot import BaseSnapshot, base_hash, checkpoint_folder
from dtrain.callbacks.strategies import refuse_sharded
from dtrain.callbacks.table import outcome_table
from dtrain.compression import compress
from dtrain.delta import Delta
from dtrain.errors import InputError
from dtrain.methods import DareX, Method
from dtrain.report import Report
from dtrain.rules import HEADS, Rules
from dtrain.weights import Weights, read_weights

#: Callbacks that put other weights into the module when training ends.
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


@dataclass(frozen=True)
class Outcome:
    """What `DeltaCompressionCallback` leaves behind.

    Args:
        path: The delta file.
        report: Its size.
        scores: What validation logs for the "base", "finetuned" and "compressed" model, by name.
        drop: How much worse the compressed model is than the fine-tuned one, in the monitored metric; None without one.
    """

    path: Path
    report: Report
    scores: dict[str, dict[str, float]]
    drop: float | None


class DeltaCompressionCallback(pl.Callback):
    """Write the fine-tuned model as one small delta file when training ends, and say what that costs.

    After `fit` it takes the last or the best weights, fits what the method leaves free on a few training batches,
    writes the file, runs the module's own validation with the base, the fine-tuned and the compressed weights, prints
    one table and logs `dtrain/bytes`, `dtrain/ratio`, `dtrain/metric_base`, `dtrain/metric_finetuned`,
    `dtrain/metric_compressed` and `dtrain/metric_drop` to every logger. The module, its checkpoints and the other
    callbacks stay untouched.

    The base is the weights before the first step of the run, kept beside the checkpoints, so that a resumed run finds
    them; or what `base` names.

    Example::

        from dtrain.callbacks import DeltaCompressionCallback

        compress = DeltaCompressionCallback(dtrain.DareX(keep=0.01), "sst2.safetensors", monitor="val_acc")
        trainer = L.Trainer(callbacks=[compress])

    Note:
        Scales are fitted on training inputs. Define `calibration_dataloader()` on the LightningModule or the data
        module to give them without augmentation, or held out; else the training data set is read in order, as it is.

    Args:
        method: How to compress; None is `DareX(keep=0.1)`.
        path: Where the file goes; None is `delta.safetensors` in the log folder of the run.
        monitor: Metric of the validation loop; None is the one that the checkpoint callback monitors, if it does.
        mode: "max" where more of it is better, "min" where less is.
        source: "last" for the weights at the end, "best" for those of the best checkpoint.
        module: Dotted name of the submodule to compress, such as "model". The file then has the names of that
            submodule, so it fits the plain model outside Lightning. Empty for the whole LightningModule.
        base: Weights that the fine-tuning starts from: a `.safetensors` file, a Hugging Face folder or a `.ckpt`.
            None takes a snapshot when training begins.
        fit_on: What q is searched on: "hidden" keeps the last hidden state (q_e, no labels), "metric" keeps the
            monitored metric (q_v) on training batches.
        calibration_batches: Number of training batches for the fit.
        include: Patterns of tensors the method may compress.
        exclude: Patterns of tensors it must leave alone; their delta is kept in half precision.
        whole: Patterns of tensors that are fresh in the fine-tuned model and stored as they are.
        drop: Patterns of tensors that stay at the base.

    Raises:
        InputError: If a setting, the strategy or the order of the callbacks cannot work; at construction or in `setup`.
    """

    def __init__(
        self,
        method: Method | None = None,
        path: str | Path | None = None,
        monitor: str | None = None,
        mode: Mode = "max",
        source: Literal["last", "best"] = "last",
        module: str = "",
        base: str | Path | None = None,
        fit_on: Literal["hidden", "metric"] = "hidden",
        calibration_batches: int = 8,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        whole: Sequence[str] = HEADS,
        drop: Sequence[str] = (),
    ) -> None:
        for name, value, allowed in (
            ("mode", mode, ("max", "min")),
            ("source", source, ("last", "best")),
            ("fit_on", fit_on, ("hidden", "metric")),
        ):
            if value not in allowed:
                raise InputError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if calibration_batches < 1:
            raise InputError(f"`calibration_batches` must be at least 1, got {calibration_batches}.")
        self.method = method or DareX()
        self.path, self.base, self.monitor = path, base, monitor
        self.mode: Mode = mode
        self.source, self.module, self.fit_on, self.calibration_batches = source, module, fit_on, calibration_batches
        self.rules = Rules(include=include, exclude=exclude, whole=whole, drop=drop)
        self.delta: Delta | None = None
        self.outcome: Outcome | None = None
        self._snapshot: BaseSnapshot | None = None
        self._base_hash: str | None = None  # of `base`, so that a resumed run notices another one
        self._resumed = False

    @property
    @override
    def state_key(self) -> str:
        """Several callbacks may compress several parts, each into its own file."""
        return self._generate_state_key(module=self.module, path=str(self.path))

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called when a checkpoint is saved: remember the base by name and hash."""
        snapshot = self._snapshot
        return {
            "snapshot": None if snapshot is None else [snapshot.name, snapshot.sha256],
            "base_sha256": self._base_hash,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is restored that was written with this callback."""
        saved = state_dict["snapshot"]
        self._snapshot = None if saved is None else BaseSnapshot(*saved)
        self._base_hash = state_dict["base_sha256"]

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage begins: refuse what cannot work now rather than after hours of training."""
        if stage != "fit":
            return
        refuse_sharded(trainer, "DeltaCompressionCallback", "its weights would have to be gathered")
        callbacks = cast("list[pl.Callback]", trainer.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
        later = callbacks[callbacks.index(self) + 1 :]
        names = [parent.__name__ for callback in later for parent in type(callback).__mro__]
        if self.source == "last" and (found := [name for name in _AVERAGING if name in names]):
            raise InputError(
                f"{found[0]} puts averaged weights into the module when training ends, after DeltaCompressionCallback "
                f"has compressed the others. Put DeltaCompressionCallback behind {found[0]} in `callbacks`."
            )
        if self.source == "best" and trainer.checkpoint_callback is None:
            raise InputError(
                "source='best' needs a checkpoint callback. Add ModelCheckpoint(monitor=...) or use 'last'."
            )

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is restored, whether or not this callback was there when it was written."""
        self._resumed = True

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins: make sure that the base will be there at the end."""
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        self._target(pl_module)
        if self.base is not None:
            found = base_hash(self.base)
            if self._resumed and self._base_hash not in (None, found):
                raise InputError(
                    f"the run was started with another base than {self.base}. Resume with the same weights."
                )
            self._base_hash = found
        elif self._resumed:
            self.read_base(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: the weights are those before the first step, unless the run is resumed."""
        fresh = not self._resumed and trainer.global_step == 0
        if self.base is None and fresh and not trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            self._snapshot = BaseSnapshot.take(trainer, self._target(pl_module))

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends, not when it fails: compress, write, measure, report."""
        if trainer.fast_dev_run:  # pyright: ignore[reportAttributeAccessIssue]
            return
        target = self._target(pl_module)
        base, tuned = self.read_base(trainer), self._read_tuned(trainer, target)
        live = {name: tensor.clone() for name, tensor in read_weights(target).tensors.items()}
        try:
            self.delta = compress(
                base,
                tuned,
                self.method,
                objective=self._objective(trainer, pl_module, target),
                rules=self.rules,
                training=_provenance(trainer),
            )
            path = self._write(trainer, self.delta)
            scores = self._measure(trainer, pl_module, target, base, tuned, self.delta)
        finally:
            _load(target, live)
        self.outcome = self._conclude(path, self.delta.report(), scores)
        self._publish(trainer, self.outcome)

    def _target(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError as error:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise InputError(f"the module has no submodule {self.module!r}. It has: {names}.") from error

    def read_base(self, trainer: pl.Trainer) -> Weights:
        """Return the weights that the fine-tuning started from, also after a resume.

        Raises:
            InputError: If they are not where they were put.
            BaseMismatchError: If they are not what was put there.
        """
        if self.base is not None:
            return read_weights(self.base)
        if self._snapshot is None:
            raise InputError(
                "the run is resumed from a checkpoint that was written without DeltaCompressionCallback, so its base "
                "is unknown. Give DeltaCompressionCallback(base=...) the weights that the fine-tuning started from."
            )
        folders = [checkpoint_folder(trainer)]
        if trainer.ckpt_path:
            folders.append(Path(trainer.ckpt_path).parent)
        return self._snapshot.read(list(dict.fromkeys(folders)))

    def _read_tuned(self, trainer: pl.Trainer, target: nn.Module) -> Weights:
        best = cast("str", getattr(trainer.checkpoint_callback, "best_model_path", ""))
        if self.source == "last":
            return _copy(read_weights(target))
        if not best:
            raise InputError("source='best', but no checkpoint was saved. Let ModelCheckpoint save at least once.")
        prefix = f"{self.module}." if self.module else ""
        weights = read_weights(best)
        part = {name[len(prefix) :]: t for name, t in weights.tensors.items() if name.startswith(prefix)}
        return read_weights(part)

    def _objective(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module
    ) -> ValidationObjective | None:
        if self.method.needs != "objective":
            return None
        monitor = self._monitor(trainer)
        if self.fit_on == "metric" and monitor is None:
            raise InputError("fit_on='metric' needs a metric. Set DeltaCompressionCallback(monitor=...).")
        return ValidationObjective(
            trainer,
            pl_module,
            target,
            self.calibration_batches,
            monitor if self.fit_on == "metric" else None,
            self.mode,
        )

    def _monitor(self, trainer: pl.Trainer) -> str | None:
        return self.monitor or getattr(trainer.checkpoint_callback, "monitor", None)

    def _write(self, trainer: pl.Trainer, delta: Delta) -> Path:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: every rank asks
        path = Path(self.path) if self.path is not None else Path(folder) / "delta.safetensors"
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            delta.save(path)
        trainer.strategy.barrier("dtrain_delta")
        return path

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        target: nn.Module,
        base: Weights,
        tuned: Weights,
        delta: Delta,
    ) -> dict[str, dict[str, float]]:
        loaders = trainer.val_dataloaders
        if loaders is None:
            rank_zero_warn("DeltaCompressionCallback: the run has no validation data, so no score is measured.")
            return {}
        # Compressed last: it starts from the base's tensors and the fine-tuned model's own where the base has none.
        compressed = delta.state_dict(base)
        scores: dict[str, dict[str, float]] = {}
        for who, weights in (("finetuned", tuned.tensors), ("base", base.tensors), ("compressed", compressed)):
            _load(target, weights)
            scores[who] = validate(trainer, pl_module, loaders, batches=trainer.limit_val_batches)
        return {who: scores[who] for who in ("base", "finetuned", "compressed")}

    def _conclude(self, path: Path, report: Report, scores: dict[str, dict[str, float]]) -> Outcome:
        drop = None
        if self.monitor and scores:
            tuned, compressed = (pick(scores[who], self.monitor) for who in ("finetuned", "compressed"))
            drop = tuned - compressed if self.mode == "max" else compressed - tuned
        return Outcome(path, report, scores, drop)

    def _publish(self, trainer: pl.Trainer, outcome: Outcome) -> None:
        values: dict[str, float] = {"dtrain/bytes": outcome.report.file_bytes, "dtrain/ratio": outcome.report.ratio}
        monitor = self._monitor(trainer)
        for who, found in outcome.scores.items():
            if monitor in found:
                values[f"dtrain/metric_{who}"] = found[monitor]
        if outcome.drop is not None:
            values["dtrain/metric_drop"] = outcome.drop
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        if trainer.is_global_zero:
            console = Console()
            console.print(outcome_table(outcome.scores, outcome.report, monitor))
            console.print(f"wrote {outcome.path}; `dtrain inspect` shows its bytes by kind of tensor", highlight=False)


def _copy(weights: Weights) -> Weights:
    return Weights({n: t.clone() for n, t in weights.tensors.items()}, dict(weights.aliases), weights.origin)


@torch.no_grad()
def _load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy into the module's tensors those that fit; a fresh head of another shape stays as it is."""
    own = read_weights(module)
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is not None and target.shape == tensor.shape:
            target.copy_(tensor)


def _provenance(trainer: pl.Trainer) -> dict[str, Any]:
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "precision": str(trainer.precision),
    }
