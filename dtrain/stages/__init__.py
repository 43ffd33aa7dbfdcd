"""Stages: pure functions on tensors from which every payload is made and read back."""

from dtrain.stages.code import Packed, Zstd
from dtrain.stages.pipeline import STAGES, Decoded, Payload, Pipeline, decode, encode
from dtrain.stages.quantise import BFloat16, Bits, Float16, Sign, Uniform, value_format
from dtrain.stages.select import All, Bernoulli, Stratified, random_mask

#: The whole delta in half precision: the default for vectors, where a mask would save next to nothing.
HALF = Pipeline(All(), Float16(), Packed())

__all__ = [
    "HALF",
    "STAGES",
    "All",
    "BFloat16",
    "Bernoulli",
    "Bits",
    "Decoded",
    "Float16",
    "Packed",
    "Payload",
    "Pipeline",
    "Sign",
    "Stratified",
    "Uniform",
    "Zstd",
    "decode",
    "encode",
    "random_mask",
    "value_format",
]
