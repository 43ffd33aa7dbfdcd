"""Remember the base: the weights before the first step, kept beside the checkpoints and known by their hash."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import lightning.pytorch as pl
from safetensors.torch import save
from torch import nn

from dtrain.artifact.atomic import write_atomic
from dtrain.difference import digests, fingerprint
from dtrain.errors import BaseMismatchError, InputError
from dtrain.weights import Source, Weights, read_weights


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
        sha256 = _hash(weights)
        snapshot = cls(f"dtrain-base-{sha256[:12]}.safetensors", sha256)
        folder = Path(trainer.strategy.broadcast(str(checkpoint_folder(trainer))))
        if trainer.is_global_zero and not (folder / snapshot.name).exists():
            folder.mkdir(parents=True, exist_ok=True)
            tensors = {name: tensor.cpu().contiguous() for name, tensor in weights.tensors.items()}
            write_atomic(folder / snapshot.name, [save(tensors)])
        trainer.strategy.barrier("dtrain_base")
        return snapshot

    def read(self, folders: list[Path]) -> Weights:
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
        if _hash(weights) != self.sha256:
            raise BaseMismatchError(f"{found[0]} is not the base that this run started from: its hash differs.")
        return weights


def base_hash(source: Source) -> str:
    """Return the fingerprint of all tensors of `source`, in hex."""
    return _hash(read_weights(source))


def checkpoint_folder(trainer: pl.Trainer) -> Path:
    """Return the folder where the run keeps its checkpoints."""
    folder = cast("str | None", getattr(trainer.checkpoint_callback, "dirpath", None))
    return Path(folder or trainer.default_root_dir)


def _hash(weights: Weights) -> str:
    return fingerprint(digests(weights.tensors).items()).hex()
