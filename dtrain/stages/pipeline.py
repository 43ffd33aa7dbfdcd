"""A payload's pipeline, select -> quantise -> code, run in both directions."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.code import Code, Packed, Zstd
from dtrain.stages.quantise import BFloat16, Bits, Float16, Quantise, Sign, Uniform
from dtrain.stages.select import All, Bernoulli, Select, Stratified

#: Every stage a file may name, in the order of the pipeline. The number in the file is the stage's `tag`.
STAGES: tuple[tuple[type[Select], ...], tuple[type[Quantise], ...], tuple[type[Code], ...]] = (
    (All, Bernoulli, Stratified),
    (Float16, BFloat16, Sign, Uniform, Bits),
    (Packed, Zstd),
)


@dataclass(frozen=True)
class Pipeline:
    """What a payload's bytes mean. It is stored once in a file and shared by all tensors encoded alike."""

    select: Select
    quantise: Quantise
    code: Code = Packed()  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Payload:
    """One encoded tensor: `scale * decode(payload)` approximates what was encoded.

    Args:
        pipeline: How `data` is to be read.
        data: uint8 of shape (bytes,), on the CPU.
        scale: The decoded values are multiplied by it. It is rounded to float32 at once, as it stands in the file, so
            that a delta in memory and the same delta read back give the same weights.
    """

    pipeline: Pipeline
    data: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "scale", struct.unpack("<f", struct.pack("<f", self.scale))[0])
        except OverflowError as error:
            raise InputError(f"a scale of {self.scale:g} does not fit float32. Use a larger keep or q.") from error


class Decoded(NamedTuple):
    """A decoded payload: `values` at `positions` of the flattened tensor, or everywhere where `positions` is None."""

    positions: Tensor | None
    values: Tensor


def encode(pipeline: Pipeline, name: str, values: Tensor) -> Payload:
    """Encode one tensor.

    Args:
        pipeline: The stages.
        name: The tensor's name, which picks its random mask.
        values: float32 of any shape; for `Bits` uint8 of shape (n * width,), the tensor's bytes.
    """
    flat = values.reshape(-1)
    positions = pipeline.select.positions(name, flat.numel(), flat.device)
    kept = flat if positions is None else flat[positions]
    data, scale = pipeline.quantise.encode(kept)
    return Payload(pipeline, pipeline.code.encode(data.cpu()), scale)


def decode(payload: Payload, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Decoded:
    """Decode one payload.

    Args:
        payload: What `encode` returned, or what a file holds.
        name: The tensor's name.
        shape: Shape of the tensor the payload belongs to.
        device: Where the result is wanted.

    Returns:
        Positions (int64, ascending, or None for all) and float32 values in units of the scale (for `Bits`: uint8).

    Raises:
        ValueError: If the bytes cannot be this pipeline's encoding of a tensor of this shape.
    """
    pipeline, data, numel = payload.pipeline, payload.data, math.prod(shape)
    if isinstance(pipeline.code, Packed):  # refuse before the mask is drawn: its cost grows with `numel`, not `data`
        least, most = (pipeline.quantise.size(count) for count in pipeline.select.count_bounds(numel))
        if not least <= data.numel() <= most:
            raise ValueError(f"{data.numel()} bytes where {least} to {most} were expected for shape {tuple(shape)}")
    positions = pipeline.select.positions(name, numel, device)
    count = numel if positions is None else positions.numel()
    raw = pipeline.code.decode(data, pipeline.quantise.size(count)).to(device)
    return Decoded(positions, pipeline.quantise.decode(raw, count))
