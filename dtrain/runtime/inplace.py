"""Put a delta on a live module in place, and take it off again bit for bit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dtrain.artifact import Content, Record
from dtrain.errors import AppliedStateError, BaseMismatchError
from dtrain.runtime.base import check_base, find_tensors
from dtrain.runtime.merge import Patch, patch, write
from dtrain.stages.bits import as_buffer
from dtrain.weights import Weights, read_weights, tensor_bytes


@dataclass
class Applied:
    """A delta on a module, and how to take it off.

    Args:
        content: The delta's content.
        before: What every tensor that it touches held, by name.
        after: Digests of what was put there, in the same order. Empty while tensors are being written: then some hold
            the one and some the other, and all are to be restored.
    """

    content: Content
    before: list[tuple[str, Patch]]
    after: list[bytes]


#: Modules that carry a delta, or part of one.
_APPLIED: WeakKeyDictionary[nn.Module, Applied] = WeakKeyDictionary()


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
    applied = Applied(content, [(name, _read(tensors[name], change.positions)) for name, change in patches], [])
    try:
        # Known before the first write: should the way back be interrupted as well, remove_ can go it to the end.
        _APPLIED[module] = applied
        for name, change in patches:
            write(tensors[name], change)
        applied.after = [_touched(tensors[name], change.positions) for name, change in patches]
    except BaseException:
        _restore(applied, tensors)
        _APPLIED.pop(module, None)
        raise


@torch.no_grad()
def remove_in_place(content: Content, module: nn.Module) -> None:
    """Restore what `apply_in_place` found, bit for bit. Where this is interrupted, a second call finishes it.

    Raises:
        AppliedStateError: If this delta is not applied to the module, or if the touched weights changed since.
    """
    module = _uncompiled(module)
    applied = _APPLIED.get(module)
    if applied is None or applied.content is not content:
        raise AppliedStateError("this delta is not applied to the module. Call apply_() first, on this very object.")
    tensors = _of_their_shapes(content, read_weights(module))
    for (name, before), after in zip(applied.before, applied.after or repeat(None), strict=False):
        if name not in tensors or after not in (None, _touched(tensors[name], before.positions)):
            raise AppliedStateError(
                f"{name!r} changed since the delta was applied, so the base cannot be restored. Load it again."
            )
    applied.after = []
    _restore(applied, tensors)
    del _APPLIED[module]


def _restore(applied: Applied, tensors: dict[str, Tensor]) -> None:
    for name, before in applied.before:
        write(tensors[name], before)


def _of_their_shapes(content: Content, weights: Weights) -> dict[str, Tensor]:
    shapes = {record.name: record.shape for record in content.records}
    return {name: tensor for name, tensor in find_tensors(content, weights).items() if tensor.shape == shapes[name]}


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
    return Patch(positions, flat.clone() if positions is None else flat.index_select(0, positions.to(flat.device)))


def _touched(tensor: Tensor, positions: Tensor | None) -> bytes:
    return hashlib.sha256(as_buffer(tensor_bytes(_read(tensor, positions).values))).digest()
