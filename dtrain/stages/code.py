"""Code: symbols to bytes without loss, the last stage before the file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import zstandard
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.bits import as_buffer, as_tensor, pack_bits, packed_size, unpack_bits
from dtrain.stages.cursor import Cursor
from dtrain.stages.rans import rans_decode, rans_encode

#: What is coded hardly repeats: matches of less than seven bytes, sought far and wide, cost more than they save.
_EFFORT = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6)
_LEAST_BLOCK = 1024  # a block has a header, and a table of its codes


@dataclass(frozen=True)
class Packed:
    """As many bits a symbol as it needs."""

    tag: ClassVar[int] = 0
    layout: ClassVar[str] = ""

    def encode(self, symbols: Tensor, bits: int) -> Tensor:
        """Return the bytes (uint8) of integer `symbols` of shape (n,), each less than 2**bits."""
        return pack_bits(symbols, bits)

    def decode(self, cursor: Cursor, bits: int, count: int) -> Tensor:
        """Read `count` symbols: uint8 up to eight bits, int32 above."""
        return unpack_bits(as_tensor(cursor.take(packed_size(count, bits))), bits, count)


@dataclass(frozen=True)
class Zstd:
    """The packed bytes in one Zstandard frame that states its content size."""

    tag: ClassVar[int] = 1
    layout: ClassVar[str] = ""

    def encode(self, symbols: Tensor, bits: int, pieces: int = 1) -> Tensor:
        """Return the frame (uint8) of integer `symbols` of shape (n,), each less than 2**bits.

        A block of its own, with codes of its own, begins at each of `pieces` equal pieces of the packed bytes, where
        these are not too short to be worth it.
        """
        packed = as_buffer(pack_bits(symbols, bits).cpu())
        coder = zstandard.ZstdCompressor(compression_params=_EFFORT).compressobj(len(packed))
        frame, size = bytearray(), len(packed) // pieces
        if size < _LEAST_BLOCK:
            size = max(1, len(packed))
        for start in range(0, len(packed), size):
            frame += coder.compress(packed[start : start + size])
            frame += coder.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        return as_tensor(frame + coder.flush())

    def decode(self, cursor: Cursor, bits: int, count: int) -> Tensor:
        """Read `count` symbols; the declared size is checked before anything is allocated."""
        frame, size = cursor.take(cursor.left), packed_size(count, bits)
        try:
            declared = zstandard.get_frame_parameters(frame).content_size
            if declared != size:
                raise ValueError(f"a frame of {declared} bytes where {size} were expected")
            raw = zstandard.ZstdDecompressor().decompress(frame, max_output_size=size, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise ValueError(f"no Zstandard frame of {size} bytes ({error})") from error
        if len(raw) != size:
            raise ValueError(f"{len(raw)} bytes where {size} were stated")
        return unpack_bits(as_tensor(raw), bits, count)


@dataclass(frozen=True)
class Rans:
    """Entropy-coded symbols of up to twelve bits."""

    tag: ClassVar[int] = 2
    layout: ClassVar[str] = ""

    def encode(self, symbols: Tensor, bits: int) -> Tensor:
        """Return the stream (uint8) of integer `symbols` of shape (n,), each less than 2**bits."""
        return rans_encode(symbols)

    def decode(self, cursor: Cursor, bits: int, count: int) -> Tensor:
        """Read `count` symbols: uint8 up to eight bits, int32 above."""
        return rans_decode(cursor, count, 1 << bits)


@dataclass(frozen=True)
class Parts:
    """Symbols split into 2**high parts by their upper bits (the separate quantisation of DeltaDQ).

    Part j holds the symbols that begin with j, in order, less their upper bits; which part a symbol belongs to is
    entropy-coded. Nothing is lost, and nothing is won but what the entropy coder wins.

    Args:
        high: Upper bits of a symbol, 1 or more.
    """

    high: int
    tag: ClassVar[int] = 3
    layout: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        if not 1 <= self.high <= 8:
            raise InputError(f"`high` must be in [1, 8], got {self.high}.")

    def encode(self, symbols: Tensor, bits: int) -> Tensor:
        """Return the bytes (uint8) of integer `symbols` of shape (n,), each less than 2**bits."""
        low = bits - self.high
        part = symbols.long() >> low
        within = [pack_bits(symbols[part == j].long() & ((1 << low) - 1), low) for j in range(1 << self.high) if low]
        return torch.cat([rans_encode(part), *within])

    def decode(self, cursor: Cursor, bits: int, count: int) -> Tensor:
        """Read `count` symbols: uint8 up to eight bits, int32 above."""
        low = bits - self.high
        part = rans_decode(cursor, count, 1 << self.high)
        symbols = part.to(torch.uint8 if bits <= 8 else torch.int32) << low
        for j in range(1 << self.high) if low else ():
            members = (part == j).nonzero().view(-1)
            data = as_tensor(cursor.take(packed_size(members.numel(), low)))
            symbols[members] |= unpack_bits(data, low, members.numel()).to(symbols.dtype)
        return symbols


Code = Packed | Zstd | Rans | Parts
