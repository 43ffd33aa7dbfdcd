"""How the tensors are stored that no method compresses: norms and biases, and what the base does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dtrain.rules import FreshCode, VectorCode, is_matrix
from dtrain.stages import All, BFloat16, Bits, Float16, Packed, Pipeline, Sign, Uniform, matrix_shape, value_format
from dtrain.stages.bits import packed_size

#: Quantisers with as many bits for every value.
Values = Float16 | BFloat16 | Sign | Uniform | Bits


def vector_values(code: VectorCode, dtype: torch.dtype) -> Values:
    """Return what quantises the delta of a norm or a bias of a model of this dtype.

    In 16 bits most values of a norm do not move, and the others by whole rounding steps: less than half a step, as the
    mean change is, would be lost on all of them.
    """
    if code == "auto":
        return Sign() if dtype.itemsize > 2 else Uniform(4)
    return value_format(code)


def fresh_values(code: FreshCode, shape: Sequence[int], dtype: torch.dtype) -> Values:
    """Return what quantises a tensor that is stored without the base.

    What is no matrix of at least two bytes a value stays exact: it costs next to nothing, and where it is a variance, a
    small value must not become 0.
    """
    if code == "exact" or not is_matrix(shape) or not dtype.is_floating_point or dtype.itemsize == 1:
        return Bits(dtype.itemsize)
    quantise = value_format(code)
    return replace(quantise, group=matrix_shape(shape)[1]) if isinstance(quantise, Uniform) else quantise


def dense(quantise: Values) -> Pipeline:
    """Return the stages that keep every value of a tensor."""
    return Pipeline(All(), quantise, Packed())


def dense_bytes(quantise: Values, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor's payload that `dense` makes."""
    rows, columns = matrix_shape(shape)
    side = quantise.side_bytes(rows if quantise.group else 1)
    return side + packed_size(rows * columns * quantise.symbols_per_value, quantise.bits)
