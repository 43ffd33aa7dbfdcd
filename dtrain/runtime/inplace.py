"""Put a delta on a live module in place, and take it off again bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dtrain.artifact import Content, Record
from dtrain.errors import AppliedStateError, BaseMismatchError
from dtrain.runtime.base import check_base, find_tensors
from dtrain.runtime.merge import Patch, patch, write
from dtrain.stages.bits import as_buffer
from dtrain.weights import read_weights, tensor_bytes


@dataclass(frozen=True)
class Undo:
    """What a module's tensor held before, and a digest of what was put there."""

    name: str
    before: Patch
    after: bytes


#: Modules that carry a delta: (the delta's content, how to take it off).
_APPLIED: WeakKeyDictionary[nn.Module, tuple[Content, list[Undo]]] = WeakKeyDictionary()


@torch.no_grad()
def apply_in_place(content: Content, module: nn.Module, origin: object) -> None:
    """Add a delta to the weights of `module`: all of it, or nothing.

    Raises:
        AppliedStateError: If the module carries a delta already.
        BaseMismatchError: If its weights are not the base.
        ArtifactError: If a payload does not fit.
    """
    module = _uncompiled(module)
    if module in _APPLIED:
        raise AppliedStateError("the module carries a delta already. Take it off with remove_() first.")
    weights = read_weights(module)
    _refuse_lost_ties(content.records, weights.aliases, origin)
    check_base(content, weights, origin, whole_must_exist=True)
    tensors = find_tensors(content, weights)
    # Everything is decoded before anything is written: a damaged payload leaves the module alone.
    patches = [
        (record.name, change)
        for record in content.records
        if (change := patch(record, tensors.get(record.name), origin)) is not None
    ]
    done: list[tuple[str, Patch]] = []
    try:
        for name, change in patches:
            # The old values are noted before the write, so that an interrupt between the two loses nothing.
            done.append((name, _read(tensors[name], change.positions)))
            write(tensors[name], change)
        undo = [Undo(name, before, _touched(tensors[name], before.positions)) for name, before in done]
        _APPLIED[module] = (content, undo)
    except BaseException:
        _APPLIED.pop(module, None)
        for name, before in done:
            write(tensors[name], before)
        raise


@torch.no_grad()
def remove_in_place(content: Content, module: nn.Module) -> None:
    """Restore what `apply_in_place` found, bit for bit.

    Raises:
        AppliedStateError: If this delta is not applied to the module, or if the touched weights changed since.
    """
    module = _uncompiled(module)
    applied = _APPLIED.get(module)
    if applied is None or applied[0] is not content:
        raise AppliedStateError("this delta is not applied to the module. Call apply_() first, on this very object.")
    tensors = read_weights(module).tensors
    for undo in applied[1]:
        if undo.name not in tensors or _touched(tensors[undo.name], undo.before.positions) != undo.after:
            raise AppliedStateError(
                f"{undo.name!r} changed since the delta was applied, so the base cannot be restored. Load it again."
            )
    for undo in applied[1]:
        write(tensors[undo.name], undo.before)
    del _APPLIED[module]


def _uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of `torch.compile`: both are one model."""
    return getattr(module, "_orig_mod", module)


def _refuse_lost_ties(records: Sequence[Record], aliases: dict[str, str], origin: object) -> None:
    names = {record.name for record in records}
    for other, name in aliases.items():
        if other in names and name in names:
            raise BaseMismatchError(
                f"{origin}: {name!r} and {other!r} are one tied tensor in this module, but two in the delta. "
                "Untie them, or merge with Delta.state_dict()."
            )


def _read(tensor: Tensor, positions: Tensor | None) -> Patch:
    flat = tensor.reshape(-1)
    return Patch(positions, flat.clone() if positions is None else flat[positions])


def _touched(tensor: Tensor, positions: Tensor | None) -> bytes:
    return hashlib.sha256(as_buffer(tensor_bytes(_read(tensor, positions).values))).digest()
