"""Pack small unsigned integers into bytes: value i takes bits i*k to i*k + k of one little-endian bit stream."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def packed_size(count: int, bits: int) -> int:
    """Return the bytes that `count` values of `bits` bits take; the last byte is filled with zeros."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Return uint8 of shape (packed_size(n, bits),) from int64 `codes` of shape (n,), each in [0, 2**bits)."""
    # Eight codes fill exactly `bits` bytes, so the stream is a matrix of whole bytes: no code straddles two rows.
    rows = -(-codes.numel() // 8)
    grid = torch.zeros(8 * rows, dtype=torch.int64, device=codes.device)
    grid[: codes.numel()] = codes
    single = (grid.view(rows, 8, 1) >> torch.arange(bits, device=codes.device)) & 1
    weights = 1 << torch.arange(8, device=codes.device)
    packed = (single.view(rows, bits, 8) * weights).sum(-1).to(torch.uint8)
    return packed.view(-1)[: packed_size(codes.numel(), bits)]


def unpack_bits(data: Tensor, bits: int, count: int) -> Tensor:
    """Return the int64 codes of shape (count,) that `pack_bits` packed into `data`."""
    if (bits * count) % 8 and data.numel() and int(data[-1]) >> (bits * count) % 8:
        raise ValueError("the last byte is not filled with zeros")
    rows = -(-count // 8)
    grid = torch.zeros(rows * bits, dtype=torch.uint8, device=data.device)
    grid[: data.numel()] = data
    single = (grid.view(rows, bits, 1) >> torch.arange(8, dtype=torch.uint8, device=data.device)) & 1
    weights = 1 << torch.arange(bits, device=data.device)
    return (single.view(rows, 8, bits).long() * weights).sum(-1).view(-1)[:count]


def as_buffer(data: Tensor) -> memoryview:
    """Return the bytes of a contiguous uint8 tensor on the CPU, without a copy."""
    return memoryview(cast("Any", data.numpy()))
