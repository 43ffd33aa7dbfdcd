"""Write files from a run on one or several ranks: the first writes, and all of them know whether it could."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from dtrain.artifact.atomic import make_folder
from dtrain.callbacks.outcome import Outcome, run_folder
from dtrain.delta import Delta
from dtrain.errors import DtrainError


def write_delta(trainer: pl.Trainer, delta: Delta, path: str | Path | None) -> Path:
    """Write a delta to `path`, or into the folder of the run where that is None, and return where (a collective).

    Raises:
        InputError: If it cannot be written there; on every rank.
    """
    folder = run_folder(trainer)
    place = folder / "delta.safetensors" if path is None else Path(path)

    def write() -> None:
        make_folder(place.parent)
        delta.save(place)

    on_first_rank(trainer, write)
    return place


def show(trainer: pl.Trainer, outcome: Outcome | None) -> None:
    """Print the table of an outcome, or say why there is none: a run that was over does not train, and so not end."""
    if outcome is None:
        rank_zero_warn(
            "DeltaCompressionCallback: nothing was trained, so nothing was compressed: the checkpoint is from the end "
            "of its run. Give it to dtrain.callbacks.compress_finished, or train for longer."
        )
    elif trainer.is_global_zero:
        outcome.show()


def on_first_rank(trainer: pl.Trainer, write: Callable[[], None]) -> None:
    """Let rank 0 write something while the others wait (a collective).

    Raises:
        DtrainError: What rank 0 raised, on every rank: those that wait for one that failed would wait forever.
    """
    failure: DtrainError | None = None
    if trainer.is_global_zero:
        try:
            write()
        except DtrainError as error:
            failure = error
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise failure
