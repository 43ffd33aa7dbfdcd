"""GPTQ: round a matrix column by column, and let the columns still to come make up for the errors."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

_BLOCK = 128  # columns whose errors are passed on together: one product instead of as many passes over the rest
_DAMPING = 0.01  # of the mean diagonal, as in the published code: directions that no input has stay finite


def gptq(matrix: Tensor, root: Tensor, step: Tensor, zero: Tensor, top: int) -> Tensor:
    """Return the matrix rounded to its levels so that its products with the inputs change little.

    The error of every column, times what the inverse Hessian says of the others, is taken off the columns that follow
    (Frantar et al., "GPTQ", arXiv 2210.17323, algorithm 1).

    Args:
        matrix: What is multiplied with the inputs, shape (rows, columns).
        root: `inverse_root` of X^T X of the inputs, shape (columns, columns).
        step: Step of every element, of the matrix's shape.
        zero: Code of 0 of every element, of the matrix's shape.
        top: The greatest code.

    Returns:
        float64, every element a level: step * (code - zero) with a whole code from 0 to `top`.
    """
    left, rounded = matrix.double().clone(), torch.empty_like(matrix, dtype=torch.float64)
    for start in range(0, matrix.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        errors = torch.empty_like(left[:, block])
        for at, column in enumerate(range(matrix.shape[1])[block]):
            size, origin = step[:, column].double(), zero[:, column].double()
            codes = (left[:, column] / size).round_().add_(origin).clamp_(0, top)
            rounded[:, column] = (codes - origin) * size
            errors[:, at] = (left[:, column] - rounded[:, column]) / root[column, column]
            left[:, column : block.stop] -= errors[:, at, None] * root[column, column : block.stop]
        left[:, block.stop :] -= errors @ root[block, block.stop :]
    return rounded


def inverse_root(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor (float64) of the inverse of the damped Hessian."""
    damped = hessian.double().clone()
    damped.diagonal().add_(_DAMPING * float(hessian.diagonal().mean()) + 1e-300)
    inverse = torch.cholesky_inverse(cast("Tensor", torch.linalg.cholesky(damped)))
    return cast("Tensor", torch.linalg.cholesky(inverse, upper=True))
