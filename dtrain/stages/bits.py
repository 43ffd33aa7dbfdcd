"""Pack small unsigned integers into bytes: value i takes bits i*k to i*k + k of one little-endian bit stream."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` values of `bits` bits take; the last byte is filled with zeros."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 of shape (packed_size(n, bits),) from integer `codes` of shape (n,), each in [0, 2**bits)."""
    if bits == 8:
        return codes.to(torch.uint8)
    pairs = codes.cpu().numpy().astype("<u2").view(np.uint8).reshape(-1, 2)
    single = np.unpackbits(pairs if bits > 8 else pairs[:, :1], axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(single, bitorder="little"))


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the codes of shape (count,) that `pack_bits` packed: uint8 up to eight bits, int32 above."""
    if (bits * count) % 8 and data.numel() and int(data[-1]) >> (bits * count) % 8:
        raise ValueError("the last byte is not filled with zeros")
    if bits == 8:
        return data
    single = np.unpackbits(data.cpu().numpy(), count=count * bits, bitorder="little").reshape(count, bits)
    if bits <= 8:
        return torch.from_numpy(np.packbits(single, axis=1, bitorder="little").reshape(count))
    pairs = np.packbits(single, axis=1, bitorder="little").reshape(-1)
    return torch.from_numpy(pairs.view("<u2").astype(np.int32))


def as_buffer(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous uint8 tensor on the CPU, without a copy."""
    return memoryview(cast("Any", data.numpy()))


def as_tensor(data: bytes | bytearray) -> Tensor:
    """Return bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
