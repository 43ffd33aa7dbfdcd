"""Quantise: how kept values become bytes. Decoded values are in units of the payload's scale."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.bits import pack_bits, packed_size, unpack_bits


@dataclass(frozen=True)
class Float16:
    """IEEE half precision after a power-of-two scale that puts the greatest magnitude just below 2**15.

    So the relative error (2**-11) does not depend on the size of the delta, over 29 binary orders of magnitude.
    """

    tag: ClassVar[int] = 0
    layout: ClassVar[str] = ""
    dtype: ClassVar[torch.dtype] = torch.float16
    bits: ClassVar[int] = 16

    def encode(self, values: Tensor) -> tuple[Tensor, float]:
        """Return (bytes, scale) of float32 `values` of shape (n,)."""
        scale = _power_of_two(values)
        return (values / scale).to(self.dtype).view(torch.uint8), scale

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return float32 values of shape (count,), to be multiplied by the scale."""
        aligned = torch.empty(
            count, dtype=self.dtype, device=data.device
        )  # a payload may start at any byte of the file
        aligned.view(torch.uint8).copy_(data)
        return aligned.float()

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""
        return 2 * count


@dataclass(frozen=True)
class BFloat16(Float16):
    """bfloat16 after a power-of-two scale: relative error 2**-8, over the exponent range of float32."""

    tag: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True)
class Sign:
    """One bit a value; the scale starts at the mean magnitude (BitDelta, arXiv 2402.10193, section 3.1)."""

    tag: ClassVar[int] = 2
    layout: ClassVar[str] = ""
    bits: ClassVar[int] = 1

    def encode(self, values: Tensor) -> tuple[Tensor, float]:
        """Return (bytes, scale) of float32 `values` of shape (n,)."""
        # float64 sums differ between thread counts by far less than a float32 scale can show.
        scale = float(values.abs().double().mean()) if values.numel() else 0.0
        return pack_bits((values > 0).to(torch.int64), 1), _float32(scale)

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return -1 or 1 as float32 of shape (count,)."""
        return unpack_bits(data, 1, count).float().mul_(2).sub_(1)

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""
        return packed_size(count, 1)


@dataclass(frozen=True)
class Uniform:
    """Symmetric uniform quantiser with a level at zero: codes -m..m with m = 2**(bits-1) - 1, the scale is the step.

    Args:
        bits: Bits per value, 2 to 16.
    """

    bits: int
    tag: ClassVar[int] = 3
    layout: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise InputError(f"`bits` must be in [2, 16], got {self.bits}. Use values='sign' for one bit.")

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << (self.bits - 1)) - 1

    def encode(self, values: Tensor) -> tuple[Tensor, float]:
        """Return (bytes, scale) of float32 `values` of shape (n,)."""
        step = _float32(_greatest(values) / self.top) or 1.0
        codes = (values / step).round_().clamp_(-self.top, self.top).long() + self.top
        return pack_bits(codes, self.bits), step

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return codes as float32 of shape (count,)."""
        return unpack_bits(data, self.bits, count).sub_(self.top).float()

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""
        return packed_size(count, self.bits)


@dataclass(frozen=True)
class Bits:
    """The bit pattern of every value, lowest byte of all values first: equal high bytes become runs for a coder.

    Args:
        width: Bytes per value: 1, 2, 4, 8 or 16.
    """

    width: int
    tag: ClassVar[int] = 4
    layout: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        if self.width not in (1, 2, 4, 8, 16):
            raise InputError(f"`width` must be 1, 2, 4, 8 or 16 bytes, got {self.width}.")

    @property
    def bits(self) -> int:
        """Bits per value."""
        return 8 * self.width

    def encode(self, values: Tensor) -> tuple[Tensor, float]:
        """Return (bytes, 1) of uint8 `values` of shape (n * width,), value by value."""
        return values.view(-1, self.width).t().contiguous().view(-1), 1.0

    def decode(self, data: Tensor, count: int) -> Tensor:
        """Return uint8 of shape (count * width,), value by value."""
        return data.view(self.width, count).t().contiguous().view(-1)

    def size(self, count: int) -> int:
        """Return the bytes that `count` values take."""
        return self.width * count


Quantise = Float16 | BFloat16 | Sign | Uniform | Bits

VALUES: dict[str, Quantise] = {
    "float16": Float16(),
    "bfloat16": BFloat16(),
    "uniform8": Uniform(8),
    "uniform4": Uniform(4),
    "uniform2": Uniform(2),
    "sign": Sign(),
}


def value_format(name: str) -> Quantise:
    """Return the quantiser that `values=name` of a method stands for."""
    if name not in VALUES:
        raise InputError(f"`values` must be one of {', '.join(VALUES)}, got {name!r}.")
    return VALUES[name]


def _greatest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _power_of_two(values: Tensor) -> float:
    """Return 2**e with max |values| / 2**e in [2**14, 2**15), kept within the normal range of float32."""
    _, exponent = math.frexp(_greatest(values))
    return 2.0 ** max(exponent - 15, -126)


def _float32(value: float) -> float:
    """Round to the float32 that the file stores, so that memory and file hold the same scale."""
    return float(torch.tensor(value, dtype=torch.float32))
