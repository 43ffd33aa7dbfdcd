"""Stages: pure functions on tensors from which every payload is made and read back."""

from dtrain.stages.code import Packed, Parts, Rans, Zstd
from dtrain.stages.index import Indexed
from dtrain.stages.mixed import Mixed
from dtrain.stages.philox import random_order
from dtrain.stages.pipeline import (
    STAGES,
    Decoded,
    Payload,
    Pipeline,
    check_size,
    decode,
    draw,
    encode,
    kept_values,
    rebuild,
)
from dtrain.stages.quantise import (
    Affine,
    BFloat16,
    Bits,
    DeadZone,
    Float16,
    Levels,
    Shared,
    Sign,
    Uniform,
    blocks,
    value_bits,
    value_format,
)
from dtrain.stages.select import All, Bernoulli, Stratified, random_mask
from dtrain.stages.structure import UNITS, Groups, Unit, Units
from dtrain.stages.transform import BlockDct, LowRank, Plain, Transposed, balanced, matrix_shape, singular_factors

#: The whole delta in half precision: the default for vectors, where a mask would save next to nothing.
HALF = Pipeline(All(), Float16(), Packed())
#: In the place of a payload: those that the shared file has for the tensor, times the scale. It has no data.
SHARED = Pipeline(All(), Shared(), Packed())

__all__ = [
    "HALF",
    "SHARED",
    "STAGES",
    "UNITS",
    "Affine",
    "All",
    "BFloat16",
    "Bernoulli",
    "Bits",
    "BlockDct",
    "DeadZone",
    "Decoded",
    "Float16",
    "Groups",
    "Indexed",
    "Levels",
    "LowRank",
    "Mixed",
    "Packed",
    "Parts",
    "Payload",
    "Pipeline",
    "Plain",
    "Rans",
    "Shared",
    "Sign",
    "Stratified",
    "Transposed",
    "Uniform",
    "Unit",
    "Units",
    "Zstd",
    "balanced",
    "blocks",
    "check_size",
    "decode",
    "draw",
    "encode",
    "kept_values",
    "matrix_shape",
    "random_mask",
    "random_order",
    "rebuild",
    "singular_factors",
    "value_bits",
    "value_format",
]
