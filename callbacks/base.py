"""The base of a run: the weights that the fine-tuning started from, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import nn

from dtrain.callbacks.live import part_of, submodule
from dtrain.callbacks.snapshot import BaseSnapshot, fingerprint_hex, snapshot_folders
from dtrain.errors import InputError
from dtrain.weights import Weights, read_weights

#: Where a checkpoint says, per compressed submodule, what the base of its run is.
CHECKPOINT_KEY = "dtrain_base"


class Base:
    """Finds the base again, whatever happened to the run in between.

    Args:
        source: A path to read it from; None takes a snapshot before the first step.
        part: Name of the submodule that it belongs to.
    """

    def __init__(self, source: str | Path | None, part: str) -> None:
        self._source, self._part = source, part
        self._snapshot: BaseSnapshot | None = None
        self._sha256: str | None = None  # of `source`, so that a resumed run notices another one
        self._resumed = False

    def begin(self) -> None:
        """Forget that an earlier fit was resumed."""
        self._resumed = False

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Note the base in a checkpoint, by name and hash.

        Not as the callback's own state: several callbacks may compress one submodule, and the path they write to, all
        they differ in, may change before the run is resumed.
        """
        note: dict[str, Any] = checkpoint.setdefault(CHECKPOINT_KEY, {}).setdefault(self._part, {})
        if self._snapshot is not None:
            note["snapshot"] = [self._snapshot.name, self._snapshot.sha256]
        if self._sha256 is not None:
            note["sha256"] = self._sha256

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Read the note from a checkpoint, if it has one."""
        notes: dict[str, dict[str, Any]] = checkpoint.get(CHECKPOINT_KEY, {})
        note = notes.get(self._part)
        # An empty note is from before the first step, where the learning rate finder saves and restores.
        self._resumed = note is None or bool(note)
        self._snapshot = BaseSnapshot(*note["snapshot"]) if note and "snapshot" in note else None
        self._sha256 = note.get("sha256") if note else None

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make sure, before training goes on, that the base will be there at the end (a collective).

        Raises:
            InputError: If it is missing, not of this model, or not the one that the run was begun with.
            BaseMismatchError: If the snapshot changed.
        """
        if self._source is None:
            if self._resumed:
                weights = self.read(trainer, pl_module)
                if self._snapshot is not None:  # the next resume may be from a checkpoint in this run's own folder
                    self._snapshot.keep(trainer, weights)
            else:
                snapshot_folders(trainer)
            return
        found = fingerprint_hex(self.read(trainer, pl_module))
        if self._resumed and self._sha256 not in (None, found):
            raise InputError(
                f"the run was begun with another base than {self._source}. Resume it with the weights that the "
                "fine-tuning started from."
            )
        self._sha256 = found

    def take(self, trainer: pl.Trainer, module: nn.Module) -> None:
        """Take the snapshot, if one is needed and this is the moment (a collective)."""
        if self._source is None and not self._resumed and trainer.global_step == 0:
            self._snapshot = BaseSnapshot.take(trainer, module)

    def read(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Weights:
        """Return the weights.

        Raises:
            InputError: If they are not where they were put, or not of this model.
            BaseMismatchError: If they are not what was put there.
        """
        if self._source is not None:
            return _matching(read_weights(self._source), pl_module, self._part)
        if self._snapshot is None:
            begun = "with a `base`" if self._sha256 else f"without DeltaCompressionCallback(module={self._part!r})"
            raise InputError(
                f"the run was begun {begun}, so there is no snapshot of its base. Give DeltaCompressionCallback("
                "base=...) the weights that the fine-tuning started from."
            )
        return self._snapshot.read(snapshot_folders(trainer))


def _matching(base: Weights, pl_module: pl.LightningModule, part: str) -> Weights:
    """Return the base by the names of the submodule called `part`: a Lightning checkpoint of it has longer ones."""
    module = submodule(pl_module, part)
    for weights in (base, part_of(base, part)):
        if weights is not None and _share_names(weights, module):
            return weights
    children = [name for name, child in module.named_children() if child.state_dict() and _share_names(base, child)]
    advice = (
        f"Set DeltaCompressionCallback(module={'.'.join(filter(None, (part, children[0])))!r})." if children else ""
    )
    raise InputError(
        f"the base {base.origin} has no tensor of the module by name: {next(iter(base.tensors))!r} there, "
        f"{next(iter(read_weights(module).tensors))!r} in the module. {advice or 'Give the weights of this model.'}"
    )


def _share_names(weights: Weights, module: nn.Module) -> bool:
    own = read_weights(module)
    return any(weights.get(name) is not None for name in [*own.tensors, *own.aliases])
