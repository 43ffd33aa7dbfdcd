"""Give the delta file to W&B, where the run has a `WandbLogger`."""

from __future__ import annotations

import importlib
import importlib.util
import re
from typing import Any, cast

import lightning.pytorch as pl

from dtrain.callbacks.outcome import Outcome
from dtrain.callbacks.table import score_rows
from dtrain.delta import Delta
from dtrain.errors import InputError

COLUMNS = ("", "base", "finetuned", "compressed")


def log_to_wandb(trainer: pl.Trainer, outcome: Outcome, delta: Delta) -> None:
    """Log the file as an artifact of the type "delta", with its table inside, and the table beside it.

    Args:
        trainer: The trainer of the run. Without a `WandbLogger` nothing happens, and wandb is not imported.
        outcome: What is logged.
        delta: What the file holds.
    """
    for logger in wandb_loggers(trainer) if trainer.is_global_zero else ():
        wandb = importlib.import_module("wandb")
        sizes = [
            ("bytes", None, outcome.report.checkpoint_bytes, outcome.report.file_bytes),
            ("ratio", None, 1.0, outcome.report.ratio),
        ]
        rows = [list(row) for row in [*score_rows(outcome.scores, outcome.monitor), *sizes]]
        run = logger.experiment
        name = re.sub(r"[^\w.-]", "-", f"{outcome.path.stem}-{run.id}")  # what W&B allows
        artifact = wandb.Artifact(name, type="delta", metadata=_metadata(outcome, delta))
        artifact.add_file(str(outcome.path))  # a copy is kept until it is uploaded: the next run may write there
        artifact.add(wandb.Table(columns=list(COLUMNS), data=rows), "outcome")
        run.log_artifact(artifact)
        logger.log_table("dtrain/outcome", columns=list(COLUMNS), data=rows, step=trainer.global_step)


def check_installed() -> None:
    """Raise an InputError if there is no W&B to log to."""
    if importlib.util.find_spec("wandb") is None:
        raise InputError("W&B is not installed. For its sweeps and its WandbLogger: pip install wandb.")


def check_wandb(trainer: pl.Trainer) -> None:
    """Open the runs of W&B now, so that what keeps them from it is said before anything is loaded.

    Raises:
        InputError: If nobody is logged in, or W&B cannot be reached.
    """
    for logger in wandb_loggers(trainer) if trainer.is_global_zero else ():
        wandb = importlib.import_module("wandb")
        try:
            _ = logger.experiment
        except wandb.Error as error:
            raise InputError(
                f"W&B opens no run ({str(error).splitlines()[0]}). Log in with `wandb login`, or keep the run on this "
                "machine: set WANDB_MODE=offline."
            ) from error


def wandb_loggers(trainer: pl.Trainer) -> list[Any]:
    """Return the trainer's loggers to W&B. By name: pytorch_lightning and lightning.pytorch each have their own."""
    loggers = cast("list[Any]", trainer.loggers)
    return [logger for logger in loggers if "WandbLogger" in [parent.__name__ for parent in type(logger).__mro__]]


def _metadata(outcome: Outcome, delta: Delta) -> dict[str, Any]:
    return {
        "base_fingerprint": delta.content.fingerprint.hex(),
        "bits_per_parameter": outcome.report.bits_per_parameter,
        "monitor": outcome.monitor,
        "scores": {who: dict(found) for who, found in outcome.scores.items()},
        **{name.removeprefix("dtrain/"): value for name, value in outcome.values().items()},
        **delta.content.metadata,  # method, fit, training: what the file says of itself
    }
