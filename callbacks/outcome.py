"""What a run leaves behind: the file, its size, and what it costs in quality."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from rich.console import Console

from dtrain.callbacks.table import outcome_table
from dtrain.callbacks.trade import Trade
from dtrain.delta import Delta
from dtrain.report import Report


@dataclass(frozen=True)
class Outcome:
    """What `DeltaCompressionCallback` leaves behind.

    Args:
        path: The delta file.
        report: Its size.
        scores: What validation logs for the "base", "finetuned" and "compressed" model, by name.
        monitor: The metric that counts; None without one, or where validation does not log it.
        drop: How much worse the compressed model is than the fine-tuned one, in that metric.
        traded: What bytes and score are worth together, by the name it has in the logs; empty without a metric.
        fitted: The loss of the fit at its start and with the scales that were kept; None where nothing was fitted to an
            objective.
    """

    path: Path
    report: Report
    scores: Mapping[str, Mapping[str, float]]
    monitor: str | None
    drop: float | None
    traded: Mapping[str, float]
    fitted: tuple[float | None, float] | None = None

    def values(self) -> dict[str, float]:
        """Return what goes to the loggers."""
        values: dict[str, float] = {"dtrain/bytes": self.report.file_bytes, "dtrain/ratio": self.report.ratio}
        if self.monitor is not None and self.drop is not None:
            values |= {f"dtrain/metric_{who}": found[self.monitor] for who, found in self.scores.items()}
            values |= {"dtrain/metric_drop": self.drop, **self.traded}
        if self.fitted is not None:
            names = ("dtrain/fit_start", "dtrain/fit_loss")
            values |= {name: loss for name, loss in zip(names, self.fitted, strict=True) if loss is not None}
        return values

    def log(self, trainer: pl.Trainer) -> None:
        """Write the values to every logger: `LightningModule.log` is forbidden when training ends."""
        for logger in trainer.loggers:
            logger.log_metrics(self.values(), step=trainer.global_step)
            logger.save()

    def show(self) -> None:
        """Print the table."""
        console = Console()
        console.print(outcome_table(self.scores, self.report, self.monitor))
        console.print(
            f"wrote {self.path}; `dtrain inspect` shows its bytes by kind of tensor", highlight=False, soft_wrap=True
        )


class FitLog:
    """Called with the losses of a fit: writes them to every logger, on the steps that follow those of the training.

    Args:
        trainer: The trainer of the run.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._trainer, self._seen = trainer, 0

    def __call__(self, number: int, loss: float) -> None:
        """Log one loss. Not by its number: a fit counts steps and evaluations apart."""
        self._seen += 1
        if self._trainer.is_global_zero and math.isfinite(loss):
            for logger in self._trainer.loggers:
                logger.log_metrics({"dtrain/fit_loss": loss}, step=self._trainer.global_step + self._seen)


def conclude(
    path: Path, delta: Delta, scores: Mapping[str, Mapping[str, float]], monitor: str | None, mode: str, trade: Trade
) -> Outcome:
    """Return the outcome; `monitor` counts if every model was scored by it."""
    report, fit = delta.report(), delta.content.metadata.get("fit", {})
    fitted = (fit.get("start"), fit["loss"]) if "loss" in fit else None
    if monitor is None or not scores or any(monitor not in found for found in scores.values()):
        return Outcome(path, report, scores, None, None, {}, fitted)
    tuned, compressed = (scores[who][monitor] for who in ("finetuned", "compressed"))
    drop = tuned - compressed if mode == "max" else compressed - tuned
    traded = trade.values(report.file_bytes, trade.shortfall(compressed, tuned, mode))
    return Outcome(path, report, scores, monitor, drop, traded, fitted)


def provenance(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what the file says of the training."""
    return {
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "optimizers": [type(optimizer).__name__ for optimizer in trainer.optimizers],
        "precision": str(trainer.precision),
    }


def run_folder(trainer: pl.Trainer) -> Path:
    """Return a folder that belongs to this run alone, where its logger has one (a collective)."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.loggers and getattr(trainer.loggers[0], "log_dir", None) is None:
        logger = trainer.loggers[0]  # all its runs save to one folder; checkpoints go below it by name and version
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = folder / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(folder)))
