"""A scale for every row (output) of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages import Float16, Indexed, Payload, Plain, Sign, decode, encode, matrix_shape


def scale_rows(payload: Payload, name: str, shape: Sequence[int], factors: Tensor) -> Payload:
    """Return a payload whose rows are multiplied by `factors`.

    Values in half precision take them in; a sign gets a magnitude per row, which costs two bytes a row.

    Args:
        payload: What is to be scaled.
        name: The tensor's name.
        shape: The tensor's shape; a row is all that has the same first index.
        factors: One per row, 0 or more, shape (rows,).

    Raises:
        InputError: If its values can be neither.
    """
    columns = matrix_shape(shape)[1]
    transform, quantise = payload.pipeline.transform, payload.pipeline.quantise
    if isinstance(quantise, Sign):
        quantise = Sign(columns)
    if type(transform) is not Plain or not isinstance(quantise, (Float16, Sign)):
        raise InputError(
            f"rows of {type(quantise).__name__} values behind {type(transform).__name__} cannot have scales of their "
            "own. Use per='tensor', or float16, bfloat16 or sign values."
        )
    decoded = decode(payload, name, shape)
    values = decoded.dense(math.prod(shape)) * payload.scale
    values = (values.view(len(factors), -1) * factors.float()[:, None]).view(tuple(shape))
    positions = decoded.positions if isinstance(payload.pipeline.select, Indexed) else None
    return encode(replace(payload.pipeline, quantise=quantise), name, values, positions=positions)
