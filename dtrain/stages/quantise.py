"""Quantise: how kept values become symbols of a few bits. Decoded values are in units of the payload's scale.

A quantiser writes side information (scales of blocks, levels) and symbols; the code stage writes the symbols. A block
is a run of `group` neighbouring coefficients, whether they are kept or not: a row, where `group` is the row's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.bits import pack_bits, packed_size, unpack_bits

_NONE = torch.empty(0, dtype=torch.uint8)


class Coded(NamedTuple):
    """What a quantiser makes of values: `side` bytes (uint8), `symbols` (uint8 or int32) and the scale."""

    side: Tensor
    symbols: Tensor
    scale: float


class Blocks(NamedTuple):
    """Which block every kept value belongs to.

    Args:
        ids: int64 of shape (kept,), or None where there is one block.
        number: How many there are, whether they keep a value or not.
    """

    ids: Tensor | None
    number: int

    def spread(self, per_block: Tensor) -> Tensor:
        """Return one value per kept value from one per block."""
        return per_block if self.ids is None else per_block[self.ids]

    def gather(self, values: Tensor, how: str) -> Tensor:
        """Return one float32 per block: the "mean", "amax" or "amin" of its values, 0 where it keeps none."""
        ids = torch.zeros_like(values, dtype=torch.int64) if self.ids is None else self.ids
        out = torch.zeros(self.number, dtype=torch.float64, device=values.device)
        return out.scatter_reduce_(0, ids, values.double(), how, include_self=False).float()


def blocks(group: int, numel: int, positions: Tensor | None) -> Blocks:
    """Return the blocks of `group` coefficients among `numel`; `group=0` makes one block of all."""
    if not group:
        return Blocks(None, 1)
    return Blocks((torch.arange(numel) if positions is None else positions) // group, -(-numel // group))


@dataclass(frozen=True)
class Float16:
    """IEEE half precision after a power-of-two scale that puts the greatest magnitude just below 2**15.

    So the relative error (2**-11) does not depend on the size of the delta, over 29 binary orders of magnitude.
    """

    tag: ClassVar[int] = 0
    layout: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float16
    group: ClassVar[int] = 0
    bits: ClassVar[int] = 8
    symbols_per_value: ClassVar[int] = 2

    def encode(self, values: Tensor, parts: Blocks) -> Coded:
        """Quantise float32 `values` of shape (n,)."""
        scale = _power_of_two(values)
        return Coded(_NONE, (values / scale).to(self.dtype).view(torch.uint8), scale)

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return float32 values of shape (n,), to be multiplied by the scale."""
        aligned = torch.empty(symbols.numel() // 2, dtype=self.dtype)  # a payload may start at any byte of the file
        aligned.view(torch.uint8).copy_(symbols)
        return aligned.float()

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return 0


@dataclass(frozen=True)
class BFloat16(Float16):
    """bfloat16 after a power-of-two scale: relative error 2**-8, over the exponent range of float32."""

    tag: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class Sign:
    """One bit a value; the scale starts at the mean magnitude (BitDelta, arXiv 2402.10193, section 3.1).

    Args:
        group: Coefficients that share a mean magnitude, stored in half precision; 0 for one scale in all.
    """

    group: int = 0
    tag: ClassVar[int] = 2
    layout: ClassVar[str] = "I"
    bits: ClassVar[int] = 1
    symbols_per_value: ClassVar[int] = 1

    def encode(self, values: Tensor, parts: Blocks) -> Coded:
        """Quantise float32 `values` of shape (n,)."""
        bits = (values > 0).to(torch.uint8)
        if self.group:
            side, _, scale = to_halves(parts.gather(values.abs(), "mean"))
            return Coded(side, bits, scale)
        # float64 sums differ between thread counts by far less than a float32 scale can show.
        return Coded(_NONE, bits, float32(float(values.abs().double().mean()) if values.numel() else 0.0))

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return -1 or 1, times the block's mean magnitude where there are blocks, as float32 of shape (n,)."""
        signs = symbols.float().mul_(2).sub_(1)
        return signs * parts.spread(from_halves(side)) if self.group else signs

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return 2 * count if self.group else 0


@dataclass(frozen=True)
class Uniform:
    """Symmetric uniform quantiser with a level at zero: codes -m..m with m = 2**(bits-1) - 1, the scale is the step.

    Args:
        bits: Bits per value, 2 to 16.
        group: Coefficients that share a step, stored in half precision; 0 for one step in all.
    """

    bits: int
    group: int = 0
    tag: ClassVar[int] = 3
    layout: ClassVar[str] = "BI"
    symbols_per_value: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"`bits` must be in [2, 16], got {self.bits}. Use values='sign' for one bit.")

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - 1)) - 1

    def encode(self, values: Tensor, parts: Blocks) -> Coded:
        """Quantise float32 `values` of shape (n,)."""
        side, scale = _NONE, float32(_greatest(values) / self.top) or 1.0
        step = torch.tensor(scale)
        if self.group:
            side, halves, scale = to_halves(parts.gather(values.abs(), "amax") / self.top)
            step = parts.spread(halves) * scale
        codes = (values / step.where(step != 0, 1.0)).round_().clamp_(-self.top, self.top)
        return Coded(side, _symbols(codes + self.top, self.bits), scale)

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return codes, times the block's step where there are blocks, as float32 of shape (n,)."""
        codes = symbols.float().sub_(self.top)
        return codes * parts.spread(from_halves(side)) if self.group else codes

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return 2 * count if self.group else 0


class Levels(NamedTuple):
    """Levels step * (code - zero): side information and scale as they are stored, step and zero of every value."""

    side: Tensor
    scale: float
    step: Tensor
    zero: Tensor


@dataclass(frozen=True)
class Affine:
    """Asymmetric uniform quantiser: value = step * (code - zero), with the integer code `zero` for 0.

    The range of a block is stretched to hold 0, so that 0 has a code.

    Args:
        bits: Bits per value, 1 to 16.
        group: Coefficients that share a step (in half precision) and a zero; 0 for one of each in all.
    """

    bits: int
    group: int = 0
    tag: ClassVar[int] = 6
    layout: ClassVar[str] = "BI"
    symbols_per_value: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 16:
            raise InputError(f"`bits` must be in [1, 16], got {self.bits}.")

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    def levels(self, values: Tensor, parts: Blocks) -> Levels:
        """Return the levels between the least and the greatest of the values of every block."""
        low, high = parts.gather(values, "amin").clamp_max(0), parts.gather(values, "amax").clamp_min(0)
        halves, step, scale = to_halves((high - low) / self.top)
        if not self.group:
            scale, halves = float32(float(high - low) / self.top) or 1.0, _NONE
            step = torch.ones(1)
        step = (step * scale).where(step != 0, 1.0)
        zero = (-low / step).round().clamp(0, self.top)
        side = torch.cat([halves, pack_bits(zero.long(), self.bits)])
        return Levels(side, scale, parts.spread(step), parts.spread(zero))

    def encode(self, values: Tensor, parts: Blocks, levels: Levels | None = None) -> Coded:
        """Quantise float32 `values` of shape (n,), to their own levels unless others are given."""
        side, scale, step, zero = levels or self.levels(values, parts)
        codes = (values / step).round_().add_(zero).clamp_(0, self.top)
        return Coded(side, _symbols(codes, self.bits), scale)

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return code - zero, times the block's step where there are blocks, as float32 of shape (n,)."""
        at = 2 * parts.number if self.group else 0
        codes = symbols.float() - parts.spread(unpack_bits(side[at:], self.bits, parts.number).float())
        return codes * parts.spread(from_halves(side[:at])) if self.group else codes

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return packed_size(count, self.bits) + (2 * count if self.group else 0)


@dataclass(frozen=True)
class DeadZone:
    """Dead-zone quantiser: level |c| = floor(|v| + 1 - zone), each level with its own mean magnitude as its value.

    Values come in units of the step; |v| < zone becomes 0. Meant for an entropy coder: most symbols are 0.

    Args:
        zone: Half the width of the zero bin in steps, in (0, 2]; 0.5 makes all bins equal. Decoding does not need it.
        top: The greatest level, 1 to 127; greater magnitudes are cut.
    """

    zone: float
    top: int
    tag: ClassVar[int] = 5
    layout: ClassVar[str] = "dB"
    group: ClassVar[int] = 0
    symbols_per_value: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not (0 < self.zone <= 2 and 1 <= self.top <= 127):
            raise InputError(f"`zone` must be in (0, 2] and `top` in [1, 127], got {self.zone} and {self.top}.")

    @property
    def bits(self) -> int:
        """Bits per symbol before entropy coding."""
        return (2 * self.top).bit_length()

    def encode(self, values: Tensor, parts: Blocks) -> Coded:
        """Quantise float32 `values` of shape (n,), given in units of the step."""
        level = (values.abs() + (1 - self.zone)).floor_().clamp_(0, self.top).long()
        means = Blocks(level, self.top + 1).gather(values.abs(), "mean")[1:]
        side, _, scale = to_halves(means)
        return Coded(side, (level * values.sign().long() + self.top).to(torch.uint8), scale)

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return the signed mean magnitude of every level as float32 of shape (n,)."""
        positive = from_halves(side)
        if symbols.numel() and int(symbols.max()) > 2 * self.top:
            raise ValueError(f"symbol {int(symbols.max())} where {2 * self.top} is the greatest")
        return torch.cat([-positive.flip(0), torch.zeros(1), positive])[symbols.long()]

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information: one number a level."""
        return 2 * self.top


@dataclass(frozen=True)
class Bits:
    """The bit pattern of every value, lowest byte of all values first: equal high bytes become runs for a coder.

    Args:
        width: Bytes per value: 1, 2, 4, 8 or 16.
    """

    width: int
    tag: ClassVar[int] = 4
    layout: ClassVar[str] = "B"
    group: ClassVar[int] = 0
    bits: ClassVar[int] = 8

    def __post_init__(self) -> None:
        if self.width not in (1, 2, 4, 8, 16):
            raise InputError(f"`width` must be 1, 2, 4, 8 or 16 bytes, got {self.width}.")

    @property
    def symbols_per_value(self) -> int:
        """Bytes per value."""
        return self.width

    def encode(self, values: Tensor, parts: Blocks) -> Coded:
        """Return the planes of uint8 `values` of shape (n * width,), given value by value."""
        rows = values.cpu().numpy().reshape(-1, self.width)
        planes = np.empty(rows.shape[::-1], np.uint8)
        for byte in range(self.width):  # transposing as a whole takes several times as long
            planes[byte] = rows[:, byte]
        return Coded(_NONE, torch.from_numpy(planes.reshape(-1)), 1.0)

    def decode(self, side: Tensor, symbols: Tensor, parts: Blocks) -> Tensor:
        """Return uint8 of shape (n * width,), value by value."""
        planes = symbols.cpu().numpy().reshape(self.width, -1)
        rows = np.empty(planes.shape[::-1], np.uint8)
        for byte in range(self.width):
            rows[:, byte] = planes[byte]
        return torch.from_numpy(rows.reshape(-1))

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return 0


@dataclass(frozen=True)
class Shared:
    """No values of its own: those of the payloads that a family's shared file has for the tensor of this name.

    A file holds the scale only, by which the shared values are multiplied.
    """

    tag: ClassVar[int] = 8
    layout: ClassVar[str] = ""
    group: ClassVar[int] = 0
    bits: ClassVar[int] = 0
    symbols_per_value: ClassVar[int] = 0

    def side_bytes(self, count: int) -> int:
        """Return the bytes of side information of `count` blocks."""
        return 0


VALUES: dict[str, Float16 | BFloat16 | Sign | Uniform] = {
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "uniform8": Uniform(8),
    "uniform4": Uniform(4),
    "uniform2": Uniform(2),
    "sign": Sign(),
}


def value_format(name: str) -> Float16 | BFloat16 | Sign | Uniform:
    """Return the quantiser that `values=name` of a method stands for."""
    if name not in tuple(VALUES):  # where a list is no key, but is no name either
        raise InputError(f"`values` must be one of {', '.join(VALUES)}, got {name!r}.")
    return VALUES[name]


def value_bits(quantise: Float16 | BFloat16 | Sign | Uniform) -> int:
    """Return the bits of one value, before any entropy coding."""
    return quantise.bits * quantise.symbols_per_value


def _symbols(codes: Tensor, bits: int) -> Tensor:
    return codes.to(torch.uint8 if bits <= 8 else torch.int32)


def to_halves(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return (bytes, float32 values as they will be read, scale) of values stored in half precision."""
    _, data, scale = Float16().encode(values, Blocks(None, 1))
    return data, from_halves(data), scale


def from_halves(data: Tensor) -> Tensor:
    """Return float32 values, in units of the scale, of half-precision bytes."""
    return Float16().decode(_NONE, data, Blocks(None, 1))


def _greatest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _power_of_two(values: Tensor) -> float:
    """Return 2**e with max |values| / 2**e in [2**14, 2**15), kept within the normal range of float32."""
    _, exponent = math.frexp(_greatest(values))
    return 2.0 ** max(exponent - 15, -126)


def float32(value: float) -> float:
    """Round to the float32 that the file stores, so that memory and file hold the same scale."""
    return float(torch.tensor(value, dtype=torch.float32))
