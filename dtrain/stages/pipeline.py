"""A payload's pipeline, transform -> select -> quantise -> code, run in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.bits import as_buffer, as_tensor, packed_size
from dtrain.stages.code import Code, Packed, Parts, Rans, Zstd
from dtrain.stages.cursor import Cursor
from dtrain.stages.index import Indexed
from dtrain.stages.mixed import Mixed
from dtrain.stages.quantise import Affine, BFloat16, Bits, DeadZone, Float16, Levels, Shared, Sign, Uniform, blocks
from dtrain.stages.select import All, Bernoulli, Stratified
from dtrain.stages.structure import Groups, Units
from dtrain.stages.transform import BlockDct, Grid, LowRank, Plain, Transform, Transposed

Select = All | Bernoulli | Stratified | Groups | Units | Indexed
Quantise = Float16 | BFloat16 | Sign | Uniform | Affine | DeadZone | Mixed | Bits | Shared

#: Every stage a file may name, in the order of the pipeline. The number in the file is the stage's `tag`.
STAGES: tuple[
    tuple[type[Transform], ...], tuple[type[Select], ...], tuple[type[Quantise], ...], tuple[type[Code], ...]
] = (
    (Plain, BlockDct, LowRank, Transposed),
    (All, Bernoulli, Stratified, Groups, Units, Indexed),
    (Float16, BFloat16, Sign, Uniform, Bits, DeadZone, Affine, Mixed, Shared),
    (Packed, Zstd, Rans, Parts),
)
_MAX_CODED_BITS = 12  # of a symbol for an entropy coder


@dataclass(frozen=True)
class Pipeline:
    """What a payload's bytes mean. It is stored once in a file and shared by all tensors encoded alike.

    Raises:
        InputError: If the stages do not go together.
    """

    select: Select = All()  # noqa: RUF009 - frozen
    quantise: Quantise = Float16()  # noqa: RUF009
    code: Code = Packed()  # noqa: RUF009
    transform: Transform = Plain()  # noqa: RUF009

    def __post_init__(self) -> None:
        plain = isinstance(self.select, All) and type(self.transform) is Plain
        if isinstance(self.quantise, Bits) and not plain:
            raise InputError("Bits stores every bit of a tensor: it takes no transform and no selection.")
        if isinstance(self.quantise, Shared) and not (plain and isinstance(self.code, Packed)):
            raise InputError("Shared has no values of its own: it takes no transform, no selection and no coder.")
        if isinstance(self.quantise, Mixed):
            patch = self.transform.patch if isinstance(self.transform, BlockDct) else 0
            if self.quantise.group != patch**2 or not isinstance(self.select, All):
                raise InputError("Mixed gives bits to whole patches: it needs BlockDct, its group, and no selection.")
        if isinstance(self.select, (Units, Groups)) and type(self.transform) not in (Plain, Transposed):
            raise InputError(f"{type(self.select).__name__} follows the rows of a weight: it takes no other transform.")
        bits = self.quantise.bits
        if isinstance(self.code, Rans) and bits > _MAX_CODED_BITS:
            raise InputError(f"Rans codes symbols of {_MAX_CODED_BITS} bits at most, got {bits}. Use fewer, or Zstd.")
        if isinstance(self.code, Parts) and not (isinstance(self.quantise, Affine) and self.code.high <= bits):
            raise InputError(f"Parts splits the codes of Affine by their upper {self.code.high} bits, of {bits}.")


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
        scale = float(torch.tensor(self.scale, dtype=torch.float32))
        if not math.isfinite(scale):
            raise InputError(f"a scale of {self.scale:g} does not fit float32. Use a larger keep or q.")
        object.__setattr__(self, "scale", scale)
        if isinstance(self.pipeline.quantise, Shared) and self.data.numel():
            raise InputError("a payload that refers to the shared file has no data of its own. Give an empty tensor.")


class Decoded(NamedTuple):
    """A decoded payload: `values` at `positions` of the flattened tensor, or everywhere where `positions` is None."""

    positions: Tensor | None
    values: Tensor

    def dense(self, numel: int) -> Tensor:
        """Return all `numel` values, 0 where there is none."""
        if self.positions is None:
            return self.values
        return torch.zeros(numel, device=self.values.device).index_put_((self.positions,), self.values)


def encode(
    pipeline: Pipeline,
    name: str,
    values: Tensor,
    *,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    widths: Tensor | None = None,
    coefficients: Tensor | None = None,
    levels: Levels | None = None,
) -> Payload:
    """Encode one tensor.

    Args:
        pipeline: The stages.
        name: The tensor's name, which picks its random mask.
        values: float32 of any shape; for `Bits` uint8 of shape (n * width,), the tensor's bytes.
        positions: For `Indexed`: the coefficients to keep, int64, ascending.
        mask: What the seeded selection keeps, from `draw`, where the caller has that already.
        widths: For `Mixed`: the bits of every block, int64.
        coefficients: The transformed values, where the caller has them already.
        levels: For `Affine`: what to round to, where that is not between the least and the greatest value.
    """
    if isinstance(pipeline.quantise, Shared):
        raise InputError("Shared encodes no values: it refers to another file. Make its Payload without data.")
    if isinstance(pipeline.quantise, Bits):
        coded = pipeline.quantise.encode(values.reshape(-1), blocks(0, 0, None))
        symbols, code = coded.symbols.cpu(), pipeline.code
        planes = code.encode(symbols, 8, pipeline.quantise.width) if isinstance(code, Zstd) else code.encode(symbols, 8)
        return Payload(pipeline, planes, coded.scale)
    if coefficients is None:
        coefficients = pipeline.transform.forward(values)
    head = torch.empty(0, dtype=torch.uint8)
    if isinstance(pipeline.select, Indexed):
        if positions is None:
            raise InputError("Indexed stores positions that the caller chooses: pass positions=.")
        head = pipeline.select.encode(positions)
    elif mask is not None:
        positions = mask
    else:
        positions = pipeline.select.positions(name, _grid(coefficients), coefficients.device)
    flat = coefficients.reshape(-1)
    kept = (flat if positions is None else flat.index_select(0, positions.to(flat.device))).cpu()
    parts = blocks(pipeline.quantise.group, flat.numel(), None if positions is None else positions.cpu())
    if isinstance(pipeline.quantise, Mixed):
        if widths is None:
            raise InputError("Mixed stores widths that the caller chooses: pass widths=.")
        coded = pipeline.quantise.encode(kept, parts, widths.cpu())
    elif isinstance(pipeline.quantise, Affine):
        coded = pipeline.quantise.encode(kept, parts, levels)
    else:
        coded = pipeline.quantise.encode(kept, parts)
    data = torch.cat([head, coded.side, pipeline.code.encode(coded.symbols, pipeline.quantise.bits)])
    return Payload(pipeline, data, coded.scale**pipeline.transform.degree)


def decode(
    payload: Payload,
    name: str,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    mask: Tensor | None = None,
) -> Decoded:
    """Decode one payload.

    Args:
        payload: What `encode` returned, or what a file holds.
        name: The tensor's name.
        shape: Shape of the tensor the payload belongs to.
        device: Where the result is wanted.
        mask: What the seeded selection keeps, from `draw`, where the caller has that already.

    Returns:
        Positions (int64, ascending, or None for all) and float32 values in units of the scale (for `Bits`: uint8).

    Raises:
        ValueError: If the bytes cannot be this pipeline's encoding of a tensor of this shape.
    """
    transform, select, quantise, code = _stages(payload.pipeline)
    grid = transform.grid(shape)
    check_size(payload, shape)
    if isinstance(quantise, Shared):
        raise ValueError("the payload refers to a shared file, which was not put in its place")
    cursor = Cursor(as_buffer(payload.data))
    if isinstance(select, Indexed):
        positions = select.read(cursor, math.prod(grid))
    elif mask is not None:
        positions = mask
    else:
        positions = select.positions(name, grid, device)
    kept = math.prod(grid) if positions is None else positions.numel()
    parts = blocks(quantise.group, math.prod(grid), None if positions is None else positions.cpu())
    if isinstance(quantise, Mixed):
        side = quantise.read_side(cursor, parts)
        count = quantise.symbol_count(side, parts)
    else:
        side = as_tensor(cursor.take(quantise.side_bytes(parts.number)))
        count = kept * quantise.symbols_per_value
    symbols = code.decode(cursor, quantise.bits, count)
    if cursor.left:
        raise ValueError(f"{cursor.left} bytes are left over for shape {tuple(shape)}")
    decoded = Decoded(
        None if positions is None else positions.to(device), quantise.decode(side, symbols, parts).to(device)
    )
    if type(transform) is Plain:
        return decoded
    return Decoded(None, transform.inverse(decoded.dense(math.prod(grid)).view(grid), shape))


def draw(pipeline: Pipeline, name: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor | None:
    """Return the positions that a pipeline with a seeded mask keeps of a tensor, or None for all of them."""
    if isinstance(pipeline.select, Indexed):
        raise InputError("Indexed draws nothing: its positions are in the payload.")
    return pipeline.select.positions(name, pipeline.transform.grid(shape), device)


def rebuild(payloads: Sequence[Payload], name: str, shape: Sequence[int]) -> Tensor:
    """Return what payloads make together, the sum of scale * values: float64 of `shape`, on the CPU."""
    total = torch.zeros(math.prod(shape), dtype=torch.float64)
    for payload in payloads:
        total += decode(payload, name, shape).dense(total.numel()).double() * payload.scale
    return total.view(tuple(shape))


def kept_values(payload: Payload, shape: Sequence[int]) -> int:
    """Return how many coefficients a payload holds; those that a transform adds at the edges are not counted.

    No mask is drawn, whose cost grows with the shape that a file states: of a random one whose values fill no whole
    bytes it is the number that its last byte has room for, and of an entropy-coded one the number to be expected.
    """
    transform, select, quantise, code = _stages(payload.pipeline)
    grid = transform.grid(shape)
    if isinstance(quantise, Shared):
        return 0
    if isinstance(select, All) or isinstance(quantise, Mixed):
        return min(math.prod(grid), math.prod(shape)) if isinstance(transform, BlockDct) else math.prod(grid)
    if isinstance(select, Indexed):
        return Cursor(as_buffer(payload.data)).varint()
    least, most = select.count_bounds(grid)
    if not isinstance(code, Packed):
        return (least + most) // 2
    parts = -(-math.prod(grid) // quantise.group) if quantise.group else 1
    room = 8 * (payload.data.numel() - quantise.side_bytes(parts)) // (quantise.bits * quantise.symbols_per_value)
    return max(0, min(most, room))  # fewer bytes than the blocks need are no honest file's


def check_size(payload: Payload, shape: Sequence[int]) -> None:
    """Refuse what cannot fit before a mask is drawn, whose cost grows with the tensor and not with the data.

    Raises:
        ValueError: If the bytes are too few or too many, or hold more positions than there are.
    """
    transform, select, quantise, code = _stages(payload.pipeline)
    grid = transform.grid(shape)
    if isinstance(select, Indexed) and (count := Cursor(as_buffer(payload.data)).varint()) > math.prod(grid):
        raise ValueError(f"{count} positions do not fit a tensor of {math.prod(grid)}")
    if not isinstance(code, Packed) or isinstance(select, Indexed) or isinstance(quantise, Mixed):
        return
    side = quantise.side_bytes(-(-math.prod(grid) // quantise.group) if quantise.group else 1)
    least, most = (
        side + packed_size(count * quantise.symbols_per_value, quantise.bits) for count in select.count_bounds(grid)
    )
    if not least <= payload.data.numel() <= most:
        raise ValueError(f"{payload.data.numel()} bytes where {least} to {most} were expected for shape {tuple(shape)}")


def _stages(pipeline: Pipeline) -> tuple[Transform, Select, Quantise, Code]:
    return pipeline.transform, pipeline.select, pipeline.quantise, pipeline.code


def _grid(coefficients: Tensor) -> Grid:
    return coefficients.shape[0], coefficients.shape[1]
