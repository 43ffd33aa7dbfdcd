"""Put one record on its base tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.artifact import Record, Role
from dtrain.errors import ArtifactError
from dtrain.stages import Bits, Decoded, decode
from dtrain.weights import tensor_bytes


class Patch(NamedTuple):
    """New `values` at `positions` of a flattened tensor, or of all of it where `positions` is None."""

    positions: Tensor | None
    values: Tensor


def patch(record: Record, base: Tensor | None, origin: object = "delta") -> Patch | None:
    """Return what a record changes, or None where it changes nothing.

    Args:
        record: The record; its shape must be the base's.
        base: The base's tensor, on any device; not looked at for `WHOLE`.
        origin: The file, for messages.

    Returns:
        Values of the record's dtype on the base's device.

    Raises:
        ArtifactError: If a payload does not fit the tensor.
    """
    if record.role in (Role.SAME, Role.DROP, Role.BASE_ONLY):
        return None
    device = torch.device("cpu") if base is None else base.device
    try:
        decoded = [decode(payload, record.name, record.shape, device) for payload in record.payloads]
    except ValueError as error:
        raise ArtifactError(origin, "payload", f"{error}. Copy or download the file again.", record.name) from error
    scales = [payload.scale for payload in record.payloads]
    if record.role is Role.WHOLE and isinstance(record.payloads[0].pipeline.quantise, Bits):
        return Patch(None, _from_bytes(decoded[0].values, record))
    if record.role is Role.WHOLE:
        return add(torch.zeros(record.shape, dtype=record.dtype, device=device), decoded, scales, record.dtype)
    if base is None:
        raise ValueError(f"record {record.name!r} needs its base tensor")
    if record.role is Role.XOR:
        return Patch(None, decoded[0].values.bitwise_xor_(tensor_bytes(base).to(device)).view(record.dtype))
    return add(base, decoded, scales, record.dtype)


def add(base: Tensor, decoded: Sequence[Decoded], scales: Sequence[float], dtype: torch.dtype) -> Patch:
    """Return base + sum of scale * values, in float32 (float64 for float64 tensors), rounded once to `dtype`."""
    flat = base.reshape(-1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    only = decoded[0].positions if len(decoded) == 1 else None
    if only is not None:  # touches only what is kept
        kept = flat.index_select(0, only).to(wide) + decoded[0].values.to(wide) * scales[0]
        return Patch(only, kept.to(dtype))
    total = flat.to(wide, copy=True)
    for (positions, values), scale in zip(decoded, scales, strict=True):
        if positions is None:
            total += values.to(wide) * scale
        else:
            total[positions] += values.to(wide) * scale
    return Patch(None, total.to(dtype))


def write(tensor: Tensor, change: Patch) -> None:
    """Put a patch into `tensor`, in place."""
    flat = tensor.reshape(-1)  # a view, or a copy where the memory is not contiguous
    if change.positions is None:
        flat.copy_(change.values)
    else:
        _put(flat, change.positions.to(flat.device), change.values.to(flat))
    if not tensor.is_contiguous():
        tensor.copy_(flat.view(tensor.shape))


def merged(record: Record, base: Tensor | None, origin: object = "delta") -> Tensor:
    """Return the fine-tuned tensor that a record describes, in its dtype; it never shares memory with the base."""
    change = patch(record, base, origin)
    if change is None:
        if base is None:
            raise ValueError(f"record {record.name!r} needs its base tensor")
        return base.detach().to(record.dtype, copy=True)
    if change.positions is None:
        return change.values.view(record.shape)
    if base is None:
        raise ValueError(f"record {record.name!r} needs its base tensor")
    out = base.detach().to(record.dtype, copy=True).contiguous()
    _put(out.view(-1), change.positions, change.values)
    return out


def _put(flat: Tensor, positions: Tensor, values: Tensor) -> None:
    if flat.itemsize == 1:  # index_copy_ knows no float8
        flat, values = flat.view(torch.uint8), values.view(torch.uint8)
    flat.index_copy_(0, positions, values)


def _from_bytes(raw: Tensor, record: Record) -> Tensor:
    # A fresh buffer: a view of the file's bytes might not be aligned for the dtype.
    values = torch.empty(math.prod(record.shape), dtype=record.dtype, device=raw.device)
    if values.numel():
        values.view(torch.uint8).copy_(raw) if record.dtype != torch.uint8 else values.copy_(raw)
    return values
