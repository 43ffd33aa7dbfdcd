"""Remember the base: the weights before the first step, kept beside the checkpoints and known by their hash."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from safetensors.torch import save
from torch import nn

from dtrain.artifact.atomic import make_folder, write_atomic
from dtrain.callbacks.writing import on_first_rank
from dtrain.difference import digests, fingerprint
from dtrain.errors import BaseMismatchError, InputError
from dtrain.weights import Weights, read_weights


class BaseSnapshot:
    """Where the base of a run is, and what it must hash to.

    Args:
        name: Name of the file; it contains the first digits of the hash, so runs can share a folder.
        sha256: Fingerprint of all of its tensors, in hex.
    """

    def __init__(self, name: str, sha256: str) -> None:
        self.name, self.sha256 = name, sha256

    @classmethod
    def take(cls, trainer: pl.Trainer, module: nn.Module) -> BaseSnapshot:
        """Write the module's weights beside the checkpoints (a collective: call it on every rank)."""
        weights = read_weights(module)
        sha256 = trainer.strategy.broadcast(fingerprint_hex(weights) if trainer.is_global_zero else "")
        snapshot = cls(f"dtrain-base-{sha256[:12]}.safetensors", sha256)
        snapshot.keep(trainer, weights)
        return snapshot

    def keep(self, trainer: pl.Trainer, weights: Weights) -> None:
        """Write `weights` beside the checkpoints, if they are not there already (a collective)."""
        path = snapshot_folders(trainer)[0] / self.name

        def write() -> None:
            # A file that is there but was damaged is replaced now: at the end of the run it would be too late.
            if not self._is_intact(path):
                make_folder(path.parent)
                tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.tensors.items()}
                write_atomic(path, [save(tensors)])

        on_first_rank(trainer, write)

    def read(self, folders: Sequence[Path]) -> Weights:
        """Return the base from the first of `folders` that has it.

        Raises:
            InputError: If none has it.
            BaseMismatchError: If it is not the file that was written.
        """
        found = [folder / self.name for folder in folders if (folder / self.name).exists()]
        if not found:
            raise InputError(
                f"the base of this run, {self.name}, is neither in {' nor in '.join(map(str, folders))}. Put it back, "
                "or give DeltaCompressionCallback(base=...) the weights that the fine-tuning started from."
            )
        weights = read_weights(found[0])
        if fingerprint_hex(weights) != self.sha256:
            raise BaseMismatchError(
                f"{found[0]} is not the base that this run started from: its hash differs. Put the right file back, or "
                "give DeltaCompressionCallback(base=...) the weights that the fine-tuning started from."
            )
        return weights

    def _is_intact(self, path: Path) -> bool:
        try:
            return path.exists() and fingerprint_hex(read_weights(path)) == self.sha256
        except InputError:
            return False


def fingerprint_hex(weights: Weights) -> str:
    """Return the fingerprint of all tensors, in hex."""
    return fingerprint(digests(weights.tensors).items()).hex()


def snapshot_folders(trainer: pl.Trainer) -> list[Path]:
    """Return where a snapshot goes, and then where else it may be: beside any checkpoint of this run or the last one.

    Raises:
        InputError: If the checkpoints are not kept in a local folder.
    """
    callbacks = cast("list[object]", trainer.checkpoint_callbacks)
    places: list[str | Path] = [folder for callback in callbacks if (folder := getattr(callback, "dirpath", None))]
    places.append(trainer.default_root_dir)
    if trainer.ckpt_path:
        places.append(Path(trainer.ckpt_path).parent)
    if "://" in str(places[0]):
        raise InputError(
            f"the checkpoints go to {places[0]}, where no snapshot of the base can be kept. Give "
            "DeltaCompressionCallback(base=...) the weights that the fine-tuning starts from."
        )
    return [Path(place) for place in dict.fromkeys(places)]
