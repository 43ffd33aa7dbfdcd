"""Positions that are stored: any selection that is not a seed, coded close to its entropy.

A position is its distance from the one before. The distance is split: its low bits are packed as they are, the rest is
coded by rANS. With k of n positions chosen at random that comes to n H(k/n) bits, about log2(e n / k) per position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.stages.bits import as_tensor, pack_bits, packed_size, unpack_bits
from dtrain.stages.cursor import Cursor, varint
from dtrain.stages.rans import rans_decode, rans_encode
from dtrain.stages.transform import Grid

_ESCAPE = 63  # this symbol says: so far, and the next symbol goes on from here


@dataclass(frozen=True)
class Indexed:
    """Positions that the encoder chose, by magnitude say, written into the payload."""

    tag: ClassVar[int] = 5
    layout: ClassVar[str] = ""

    def encode(self, positions: Tensor) -> Tensor:
        """Return a self-delimiting stream (uint8) of int64 `positions` of shape (k,), ascending."""
        count = positions.numel()
        if not count:
            return as_tensor(varint(0))
        gaps = torch.diff(positions.cpu(), prepend=torch.tensor([-1])) - 1
        # Within a quarter of the mean distance low bits are all but uniform: packing them costs 0.01 bit a position.
        low = max(0, (int(positions[-1]) // count).bit_length() - 3)
        high = gaps >> low
        repeats = high // _ESCAPE
        ends = torch.cumsum(repeats + 1, 0) - 1
        symbols = torch.full((int(ends[-1]) + 1,), _ESCAPE, dtype=torch.int64)
        symbols[ends] = high - repeats * _ESCAPE
        head = varint(count) + bytes([low]) + varint(len(symbols))
        packed = _pack_low(gaps & ((1 << low) - 1), low)
        return torch.cat([as_tensor(head), packed, rans_encode(symbols)])

    def read(self, cursor: Cursor, numel: int) -> Tensor:
        """Read the positions: int64, ascending, all less than `numel`.

        Raises:
            ValueError: If they are not.
        """
        count = cursor.varint()
        if not count:
            return torch.empty(0, dtype=torch.int64)
        low, length = cursor.take(1)[0], cursor.varint()
        # Every escape goes at least 63 positions further, so an honest stream has no more symbols than positions.
        if not count <= min(length, numel) or length - count > numel // _ESCAPE or low > 48:
            raise ValueError(f"{count} positions in {length} symbols do not fit a tensor of {numel}")
        rest = _unpack_low(cursor, low, count)
        symbols = rans_decode(cursor, length, _ESCAPE + 1).long()
        ends = (symbols < _ESCAPE).nonzero().view(-1)
        if ends.numel() != count or int(ends[-1]) != length - 1:
            raise ValueError(f"{length} symbols end {ends.numel()} positions where {count} were stated")
        high = torch.diff(torch.cumsum(symbols, 0)[ends], prepend=torch.tensor([0]))
        gaps = (high.clamp_max((numel >> low) + 1) << low) + rest + 1
        if float(gaps.sum(dtype=torch.float64)) > numel:  # in floating point: integers could wrap, and seem to fit
            raise ValueError(f"a position lies outside the tensor of {numel}")
        return torch.cumsum(gaps, 0) - 1

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return the least and the greatest number of kept positions."""
        return 0, grid[0] * grid[1]


def _pack_low(values: Tensor, bits: int) -> Tensor:
    """Pack values of up to 48 bits in planes of sixteen."""
    planes = [pack_bits((values >> at) & 0xFFFF, min(16, bits - at)) for at in range(0, bits, 16)]
    return torch.cat(planes) if planes else torch.empty(0, dtype=torch.uint8)


def _unpack_low(cursor: Cursor, bits: int, count: int) -> Tensor:
    out = torch.zeros(count, dtype=torch.int64)
    for at in range(0, bits, 16):
        width = min(16, bits - at)
        out += unpack_bits(as_tensor(cursor.take(packed_size(count, width))), width, count).long() << at
    return out
