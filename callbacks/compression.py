"""Compress the delta when training ends, and measure what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from typing_extensions import override

from dtrain.callbacks.base import Base
from dtrain.callbacks.checks import (
    check_callbacks,
    check_choices,
    check_fit,
    check_path,
    check_shared,
    check_validation_step,
)
from dtrain.callbacks.evaluation import measure
from dtrain.callbacks.live import kept, part_of, same_on_all_ranks, submodule, without_counters
from dtrain.callbacks.objective import (
    Aim,
    FitOn,
    Mode,
    check_calibration,
    check_one_process,
    goal,
    missing_metric,
    pick,
    training_objective,
    validation_calibration,
)
from dtrain.callbacks.outcome import FitLog, Outcome, conclude, provenance
from dtrain.callbacks.strategies import refuse_sharded
from dtrain.callbacks.trade import Trade
from dtrain.callbacks.watch import DeltaWatch, When, check_when
from dtrain.callbacks.weights_and_biases import log_to_wandb
from dtrain.callbacks.writing import show, write_delta
from dtrain.compression import compress
from dtrain.delta import Delta
from dtrain.errors import InputError
from dtrain.fit import Fit, Learn, Search, fit_of
from dtrain.methods import Method, SeededSign
from dtrain.rules import EMBEDDINGS, HEADS, FreshCode, Rules, VectorCode
from dtrain.weights import Weights, read_weights

__all__ = ["DeltaCompressionCallback", "Outcome"]

#: What the callback does without arguments, and why is said in the docstring.
DEFAULT_METHOD: Method = SeededSign(keep=1 / 8)
DEFAULT_FIT: Fit = Search()


class DeltaCompressionCallback(pl.Callback):
    """Write the fine-tuned model as one small delta file when training ends, and say what that costs.

    After `fit` it takes the last or the best weights, fits scales on a few training batches where it is to,
    writes the file, runs the module's own validation with the base, the fine-tuned and the compressed weights, prints
    one table and logs `dtrain/bytes`, `dtrain/ratio`, `dtrain/metric_base`, `dtrain/metric_finetuned`,
    `dtrain/metric_compressed` and `dtrain/metric_drop` to every logger; W&B gets the file as an artifact. The module,
    its checkpoints and the other callbacks stay untouched.

    For sweeps, `dtrain/objective` trades bytes against score, see `Trade`: it is to be minimised, and `dtrain/feasible`
    says whether the score is within the tolerance. With a `reference` it is logged after every validation as well, for
    early termination, as if the model were kept whole: a projection could look better than the file turns out, and a
    search believes the best value that it has seen.

    While training, at the end of every epoch, it logs what the delta looks like and what its file would take, so that
    AdamR's strength can be steered: `dtrain/delta_norm`, the norm of the matrices' delta over that of the base;
    `dtrain/delta_mean_abs`, its mean magnitude; `dtrain/delta_unmoved`, the share that did not move;
    `dtrain/delta_kurtosis`, how heavy its tails are (3 for a Gaussian); `dtrain/projected_bytes` and
    `dtrain/projected_ratio`, the size of the file; and `dtrain/projected_error`, the norm of what it would lose over
    that of the delta, with the best scale for every tensor. Of more than two million elements it looks at some rows of
    every matrix, of which a low rank keeps too much.

    The base is the weights before the first step of the run, kept beside the checkpoints, so that a resumed run finds
    them; or what `base` names.

    Example::

        from dtrain.callbacks import DeltaCompressionCallback

        compress = DeltaCompressionCallback(dtrain.DareX(keep=0.01), "sst2.safetensors", monitor="val_acc")
        trainer = L.Trainer(callbacks=[compress])

    Note:
        Scales are fitted on training inputs. Define `calibration_dataloader()` on the LightningModule or the data
        module to give them without augmentation, or held out; else the training data set is used as it is.

    Note:
        Afterwards `callback.delta` is the delta and `callback.outcome` what it costs; not with `ddp_spawn`, whose
        processes take what they know with them.

    Args:
        method: How to compress. None is `SeededSign(keep=1/8)` with the fit `Search()`: signs on a seeded mask hold
            more at equal bytes than half-precision values, and one scale for all matrices, found in 18 evaluations,
            does most of what one learnt per tensor does. At 0.16 bit a weight that scored 0.841 on SST-2 (fine-tuned
            0.843, DAREx-q 0.840) and 0.614 on CIFAR-10 (0.645, 0.553), three fine-tunes each: see `bench.scales`.
        fit: How scales are found after encoding, such as `Learn()`; None for the method's own way, which is none for
            most and a search for `DareX` and `Dbms`. The loss goes to the loggers while it falls, as `dtrain/fit_loss`.
        path: Where the file goes; None is `delta.safetensors` in the log folder of the run.
        monitor: Metric of the validation loop; None is the one that the checkpoint callback monitors, if it does.
        mode: "max" where more of it is better, "min" where less is; None is the checkpoint callback's mode, if that
            monitors the same metric, else "max".
        source: "last" for the weights at the end, "best" for those of the best checkpoint.
        module: Dotted name of the submodule to compress, such as "model". The file then has the names of that
            submodule, so it fits the plain model outside Lightning. Empty for the whole LightningModule.
        base: Weights that the fine-tuning starts from: a `.safetensors` file, a Hugging Face folder or a `.ckpt`.
            None takes a snapshot when training begins.
        fit_on: What scales are fitted to, on training batches: "hidden" keeps the last hidden state (q_e) and "logits"
            the output, without labels; "metric" keeps the monitored metric (q_v), which has no gradient to learn from.
        calibration_batches: Number of training batches for the fit, or to look at the inputs of layers on.
        include: Patterns of tensors the method may compress.
        exclude: Patterns of tensors it must leave alone; the delta of a matrix is kept in half precision.
        whole: Patterns of tensors that are fresh in the fine-tuned model and stored without the base.
        drop: Patterns of tensors that stay at the base.
        shared: The file of a family's base vector, which `dtrain.shared_base` makes, for `Dbms(source="shared")`.
        embeddings: Patterns of token embeddings, which stay at the base as well where they fit it; none to compress
            them by the method.
        vectors: How the deltas of norms and biases are stored: "sign" is one bit a value and one scale a tensor,
            "uniform4" and "uniform8" are 4 and 8 bits, "float16" is half precision, "auto" is "sign", but "uniform4"
            for a dtype of 16 bits.
        fresh: How matrices are stored that are fresh: "uniform8" and "uniform4" are 8 and 4 bits a value and a step
            per row, "float16" is half precision, "exact" is bit for bit.
        watch: When to log what the delta looks like and what its file would take: a number for every so many optimizer
            steps, "epoch" for the end of every training epoch, or "never". It needs a logger.
        tolerance: Loss of `monitor` that does not matter, in its own units, for `dtrain/objective`.
        reference: Score that this loss is counted from; None for the fine-tuned model's. Where several trainings are
            compared, give the score that all of them are after: one that learns nothing has nothing to lose.

    Raises:
        InputError: If a setting, the strategy or the order of the callbacks cannot work; at construction or in `setup`.
    """

    def __init__(
        self,
        method: Method | None = None,
        path: str | Path | None = None,
        monitor: str | None = None,
        mode: Mode | None = None,
        source: Literal["last", "best"] = "last",
        module: str = "",
        base: str | Path | None = None,
        fit_on: Aim = "hidden",
        calibration_batches: int = 8,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        whole: Sequence[str] = HEADS,
        drop: Sequence[str] = (),
        embeddings: Sequence[str] = EMBEDDINGS,
        vectors: VectorCode = "auto",
        fresh: FreshCode = "uniform8",
        watch: When = "epoch",
        fit: Fit | None = None,
        shared: str | Path | None = None,
        tolerance: float = 0.005,
        reference: float | None = None,
    ) -> None:
        check_when(watch)
        check_choices(mode=(mode, ("max", "min", None)), source=(source, ("last", "best")))
        check_choices(fit_on=(fit_on, ("hidden", "logits", "metric")))
        if calibration_batches < 1:
            raise InputError(f"`calibration_batches` must be at least 1, got {calibration_batches}.")
        self.method, self.fit = (method, fit) if method is not None else (DEFAULT_METHOD, fit or DEFAULT_FIT)
        check_fit(self.method, self.fit, fit_on, calibration_batches, shared)
        self.shared, self.trade = shared, Trade(tolerance, reference)
        self.path, self.monitor, self.source, self.module = path, monitor, source, module
        self.mode: Mode | None = mode
        self.fit_on: Aim = fit_on
        self.calibration_batches = calibration_batches
        self.rules = Rules(
            include=include,
            exclude=exclude,
            whole=whole,
            drop=drop,
            embeddings=embeddings,
            vectors=vectors,
            fresh=fresh,
        )
        self.delta: Delta | None = None
        self.outcome: Outcome | None = None
        self.watch: When = watch
        self.base, self._base = base, Base(base, module)
        self._watch: DeltaWatch | None = None
        self._watched_at = 0  # the optimizer step of the last look: accumulated batches share one
        self._metrics_before: dict[str, Any] = {}  # as they were when validation began, to tell which it logs
        self._metric_seen = False  # whether validation has logged the metric in this fit

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage begins: refuse what cannot work now rather than after hours of training."""
        if stage != "fit":
            return
        self.delta, self.outcome, self._metric_seen = None, None, False
        self._watch, self._watched_at = None, 0
        self._base.begin()
        refuse_sharded(trainer, "DeltaCompressionCallback", "its weights would have to be gathered")
        check_callbacks(self, trainer, self.source)
        check_path(self.path)
        check_shared(self.shared)
        if self._needs_objective:
            check_validation_step(pl_module)
            if self.fit_on == "metric" and goal(trainer, self.monitor, self.mode)[0] is None:
                raise InputError("fit_on='metric' needs a metric. Set DeltaCompressionCallback(monitor=...).")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is saved: note the base in it."""
        self._base.save(checkpoint)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is restored, whether or not this callback was there when it was written."""
        self._base.load(checkpoint)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when fit begins: make sure that the base will be there at the end."""
        self.rules.check(read_weights(submodule(pl_module, self.module)).tensors)
        if not _is_trial(trainer):
            self._base.check(trainer, pl_module)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins: the weights are those before the first step, unless the run is resumed."""
        if self._needs_objective or self._measurers:
            check_calibration(trainer, pl_module)
        for measurer in self._measurers:
            check_one_process(trainer, measurer)
        if not _is_trial(trainer):
            self._base.take(trainer, submodule(pl_module, self.module))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Called when a batch ends: look at the delta, if it is time."""
        if isinstance(self.watch, int) and trainer.global_step % self.watch == 0:
            self._look(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when an epoch ends: look at the delta."""
        if self.watch == "epoch":
            self._look(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a validation begins: remember what was logged before it."""
        self._metrics_before = dict(trainer.callback_metrics)

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when a validation ends: a metric that the first one does not log would be missing in the end."""
        before, self._metrics_before = self._metrics_before, {}
        monitor = goal(trainer, self.monitor, self.mode)[0] if self._must_have_metric else None
        if not _in_fit(trainer) or trainer.sanity_checking:
            return
        self._log_objective(trainer, pl_module)
        if monitor is None or self._metric_seen:
            return
        # What training logged is there as well, but as the same objects as before: only validation's are new.
        found = {
            name: float(value) for name, value in trainer.callback_metrics.items() if before.get(name) is not value
        }
        pick(found, monitor)
        self._metric_seen = True

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends, not when it fails: compress, write, measure, log."""
        if _is_trial(trainer):
            return
        target = submodule(pl_module, self.module)
        monitor, mode = goal(trainer, self.monitor, self.mode)
        with kept(target) as live:
            base = self.read_base(trainer)
            tuned = self._read_tuned(trainer, target, live, base)
            self.delta = self._compress(trainer, pl_module, target, base, tuned)
            path = write_delta(trainer, self.delta, self.path)
            scores = measure(trainer, pl_module, target, base, tuned, self.delta)
        if self.monitor is not None and any(self.monitor not in found for found in scores.values()):
            rank_zero_warn(f"DeltaCompressionCallback: {missing_metric(scores['finetuned'], self.monitor)}")
        self.outcome = conclude(path, self.delta, scores, monitor, mode, self.trade)
        self.outcome.log(trainer)
        log_to_wandb(trainer, self.outcome, self.delta)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called after everything else that ends training: show the table below what others had to say."""
        if not _is_trial(trainer):
            show(trainer, self.outcome)

    def read_base(self, trainer: pl.Trainer) -> Weights:
        """Return the weights that the fine-tuning started from, also after a resume.

        Raises:
            InputError: If they are not where they were put.
            BaseMismatchError: If they are not what was put there.
        """
        return self._base.read(trainer, trainer.lightning_module)

    @property
    def _needs_objective(self) -> bool:
        fit = fit_of(self.method, self.fit)
        return self.method.needs == "objective" or (fit is not None and fit.needs == "objective")

    @property
    def _measurers(self) -> list[object]:
        """Those of method and fit that look at the inputs of layers."""
        return [each for each in (self.method, self.fit) if each is not None and each.needs_calibration]

    @property
    def _must_have_metric(self) -> bool:
        """Whether validation has to log the metric: what only the checkpoint callback asks for may be training's."""
        return self.monitor is not None or (self._needs_objective and self.fit_on == "metric")

    def _look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the delta looks like now. All ranks have the same weights, and one of them writes the logs."""
        idle = _is_trial(trainer) or not trainer.is_global_zero or not trainer.loggers
        if idle or trainer.global_step == self._watched_at:
            return
        self._watched_at = trainer.global_step
        target = submodule(pl_module, self.module)
        live = read_weights(target)
        if self._watch is None:
            self._watch = DeltaWatch(self.read_base(trainer), live, self.method, self.rules)

        def whole(method: Method) -> Delta:
            base = self.read_base(trainer)
            tuned = without_counters(live, base, target)
            return compress(base, tuned, method, rules=self.rules, shared=self.shared, training=provenance(trainer))

        values = self._watch.look(live, whole)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def _log_objective(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what the objective is as long as there is no file: the size is that of all weights."""
        monitor, mode = goal(trainer, self.monitor, self.mode)
        score = trainer.callback_metrics.get(monitor) if monitor is not None else None
        if self.trade.reference is None or score is None:
            return
        size = sum(tensor.nbytes for tensor in read_weights(submodule(pl_module, self.module)).tensors.values())
        value = self.trade.objective(size, self.trade.shortfall(float(score), float(score), mode))
        for logger in trainer.loggers:
            logger.log_metrics({"dtrain/objective": value}, step=trainer.global_step)

    def _read_tuned(self, trainer: pl.Trainer, target: nn.Module, live: Weights, base: Weights) -> Weights:
        tuned: Weights | None = live
        if self.source == "best":
            best = cast("str", getattr(trainer.checkpoint_callback, "best_model_path", ""))
            if not best:
                raise InputError("source='best', but no checkpoint was saved. Let ModelCheckpoint save at least once.")
            tuned = part_of(read_weights(best), self.module)
            if tuned is None:
                raise InputError(f"{best} holds no weights of the submodule {self.module!r}. Use source='last'.")
        return same_on_all_ranks(trainer, without_counters(tuned, base, target), target)

    def _compress(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module, base: Weights, tuned: Weights
    ) -> Delta:
        objective = calibration = None
        if self._needs_objective:
            monitor, mode = goal(trainer, self.monitor, self.mode)
            aim = FitOn(self.fit_on, monitor, mode, learns=isinstance(self.fit, Learn))
            objective = training_objective(trainer, pl_module, target, self.calibration_batches, aim)
        if self._measurers:
            calibration = validation_calibration(trainer, pl_module, target, self.calibration_batches)
        delta = compress(
            base,
            tuned,
            self.method,
            fit=self.fit,
            objective=objective,
            calibration=calibration,
            rules=self.rules,
            shared=self.shared,
            training=provenance(trainer),
            watch=FitLog(trainer),
        )
        # Every rank has fitted, in the same time, but no two need agree in the last bit: that of the first counts.
        return trainer.strategy.broadcast(delta)


def _is_trial(trainer: pl.Trainer) -> bool:
    return bool(cast("Any", trainer).fast_dev_run)


def _in_fit(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == "fit"
