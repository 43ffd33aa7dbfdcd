"""Pack small unsigned integers into bytes: value i takes bits i*k to i*k + k of one little-endian bit stream."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray[Any, Any]


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` values of `bits` bits take; the last byte is filled with zeros."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 of shape (packed_size(n, bits),) from integer `codes` of shape (n,), each in [0, 2**bits)."""
    if bits == 8:
        return codes.to(torch.uint8)
    flat = codes.cpu().numpy()
    if bits == 1:
        return torch.from_numpy(np.packbits(flat.astype(np.uint8), bitorder="little"))
    values, size, wide = _group(bits)
    groups = _rows(flat.astype(wide), values)
    out = np.zeros((len(groups), size), np.uint8)
    for i in range(values):
        first, shift = divmod(i * bits, 8)
        for byte in range(first, -(-(i + 1) * bits // 8)):
            part = groups[:, i] << shift if byte == first else groups[:, i] >> (8 * (byte - first) - shift)
            out[:, byte] |= part.astype(np.uint8)
    return torch.from_numpy(out.reshape(-1)[: packed_size(flat.size, bits)])


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of shape (count,) that `pack_bits` packed: uint8 up to eight bits, int32 above."""
    if (bits * count) % 8 and data.numel() and int(data[-1]) >> (bits * count) % 8:
        raise ValueError("the last byte is not filled with zeros")
    if bits == 8:
        return data
    flat = data.cpu().numpy()
    if bits == 1:
        return torch.from_numpy(np.unpackbits(flat, count=count, bitorder="little"))
    values, size, wide = _group(bits)
    groups = _rows(flat, size)
    out = np.empty((len(groups), values), np.uint8 if bits < 8 else np.int32)
    for i in range(values):
        first, shift = divmod(i * bits, 8)
        code = groups[:, first].astype(wide) >> shift
        for byte in range(first + 1, -(-(i + 1) * bits // 8)):
            code |= groups[:, byte].astype(wide) << (8 * (byte - first) - shift)
        out[:, i] = code & ((1 << bits) - 1)
    return torch.from_numpy(out.reshape(-1)[:count])


def _group(bits: int) -> tuple[int, int, type[Any]]:
    """Return how many values fill how many whole bytes, and a type that holds one of them shifted by seven bits."""
    values = 8 // math.gcd(bits, 8)
    return values, values * bits // 8, np.uint16 if bits <= 8 else np.uint32


def _rows(flat: Array, width: int) -> Array:
    """Return a matrix of `width` columns, filled up with zeros."""
    if len(flat) % width:
        flat = np.concatenate([flat, np.zeros(-len(flat) % width, flat.dtype)])
    return flat.reshape(-1, width)


def as_buffer(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous uint8 tensor on the CPU, without a copy."""
    return memoryview(cast("Any", data.numpy()))


def as_tensor(data: bytes | bytearray) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
