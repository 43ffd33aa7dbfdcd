"""Mixed precision: every block has its own number of bits, none included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.bits import as_tensor, pack_bits, packed_size, unpack_bits
from dtrain.stages.cursor import Cursor
from dtrain.stages.quantise import Blocks, Coded, from_halves, to_halves
from dtrain.stages.rans import rans_decode, rans_encode

MAX_WIDTH = 8


@dataclass(frozen=True)
class Mixed:
    """Blocks of `group` coefficients, each quantised between its minimum and maximum with its own bits, 0 to 8.

    A block of no bits holds its first coefficient only (the mean, where blocks are DCT patches), or nothing.

    Args:
        group: Coefficients of a block; all blocks are whole.
        fill: Whether blocks of no bits keep their first coefficient.
    """

    group: int
    fill: bool
    tag: ClassVar[int] = 7
    layout: ClassVar[str] = "IB"
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.group < 1 or self.fill not in (False, True):
            raise InputError(f"`group` must be at least 1 and `fill` 0 or 1, got {self.group} and {self.fill}.")

    def encode(self, values: Tensor, parts: Blocks, widths: Tensor) -> Coded:
        """Quantise float32 `values` of shape (blocks * group,) with `widths` of shape (blocks,) bits each."""
        matrix = values.view(-1, self.group)
        low, high = matrix.amin(1), matrix.amax(1)
        coarse = widths == 0
        low[coarse] = matrix[coarse, 0] if self.fill else 0.0
        step = ((high - low) / (2.0**widths - 1))[~coarse]
        kept = torch.cat([low if self.fill else low[~coarse], step])
        side, halves, scale = to_halves(kept)
        as_read = halves * scale
        low, step = _split(as_read, coarse, self.fill)
        # The low end was rounded to half precision: the codes are taken from what will be read.
        codes = ((matrix - low[:, None]) / step.where(step > 0, 1.0)[:, None]).round_()
        streams = [
            pack_bits(codes[widths == width].clamp_(0, 2**width - 1).view(-1).to(torch.uint8), width)
            for width in range(1, MAX_WIDTH + 1)
        ]
        return Coded(torch.cat([rans_encode(widths), side]), torch.cat(streams), scale)

    def read_side(self, cursor: Cursor, parts: Blocks) -> Tensor:
        """Read the widths (uint8, one a block), then the half-precision numbers as they are."""
        widths = rans_decode(cursor, parts.number, MAX_WIDTH + 1)
        fine = int((widths > 0).sum())
        return torch.cat([widths, as_tensor(cursor.take(2 * (fine + (parts.number if self.fill else fine))))])

    def symbol_count(self, side: Tensor, parts: Blocks) -> int:
        """Return the bytes of all codes."""
        widths = side[: parts.number]
        return sum(packed_size(int((widths == w).sum()) * self.group, w) for w in range(1, MAX_WIDTH + 1))

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return float32 values of shape (blocks * group,)."""
        widths = side[: parts.number]
        low, step = _split(from_halves(side[parts.number :]), widths == 0, self.fill)
        out = torch.zeros(parts.number, self.group)
        if self.fill:
            out[:, 0] = low
        at = 0
        for width in range(1, MAX_WIDTH + 1):
            chosen = (widths == width).nonzero().view(-1)
            size = packed_size(chosen.numel() * self.group, width)
            codes = unpack_bits(symbols[at : at + size], width, chosen.numel() * self.group)
            out[chosen] = low[chosen, None] + step[chosen, None] * codes.view(-1, self.group)
            at += size
        return out.view(-1)


def _split(halves: Tensor, coarse: Tensor, fill: bool) -> tuple[Tensor, Tensor]:
    """Return (low, step) of every block; the step of a block of no bits is 0."""
    low, step = torch.zeros(coarse.numel()), torch.zeros(coarse.numel())
    stored = coarse.numel() if fill else int((~coarse).sum())
    low[torch.ones_like(coarse) if fill else ~coarse] = halves[:stored]
    step[~coarse] = halves[stored:]
    return low, step
