"""How a delta's energy is spread over its singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dtrain.stages import matrix_shape

BUDGET = 1 << 40  # multiply-adds for all matrices: at most a few minutes on one core, seconds on many
_EIGEN = 4  # multiply-adds of a symmetric eigenvalue problem, in cubes of its side
_ROWS = 4096  # of a matrix that are float64 at a time
_FACTOR_BITS = 8
_REST = 1e-4  # share of the energy that a rank may leave out and still count as exact


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one delta, in shares of their energy (the sum of their squares).

    Args:
        side: The shorter side: how many singular values there are.
        stable_rank: ||D||_F^2 / ||D||_2^2, the energy in units of the greatest singular value's.
        rank90: How many of the greatest hold 90 % of the energy.
        rank: How many are left once 0.01 % of the energy, or what rounding to the checkpoint's dtype explains, is taken
            off the end.
        top1: Energy of the greatest 1 % of them, one at least.
        top5: Energy of the greatest 5 %.
        factors: Energy of the greatest m * n / (8 (m + n)), whose 8-bit factors cost one bit per weight of the m x n
            matrix.
        rounding: The energy that rounding to the fine-tuned dtype is expected to add.
    """

    side: int
    stable_rank: float
    rank90: int
    rank: int
    top1: float
    top5: float
    factors: float
    rounding: float


def measure_spectrum(delta: Tensor, tuned: Tensor) -> Spectrum:
    """Return the spectrum of a delta.

    Args:
        delta: float32 of two dimensions or more, on the CPU, not all zero; all but the first are taken as one.
        tuned: The fine-tuned tensor in its own dtype, of the same shape.
    """
    rows, columns = matrix_shape(delta.shape)
    matrix = delta.reshape(rows, columns)
    values = cast("Tensor", torch.linalg.eigvalsh(_gram(matrix))).flip(0).clamp(min=0)
    energy = float(values.sum())
    shares = values.cumsum(0) / energy
    rounding = rounding_energy(tuned) / energy
    side = min(rows, columns)

    def top(count: int) -> float:
        return float(shares[max(1, count) - 1])

    def needed(share: float) -> int:
        return int((shares < share).sum()) + 1 if share > 0 else 0

    return Spectrum(
        side=side,
        stable_rank=energy / float(values[0]),
        rank90=needed(0.9),
        rank=min(side, needed(1 - max(_REST, rounding))),
        top1=top(round(0.01 * side)),
        top5=top(round(0.05 * side)),
        factors=top(rows * columns // (_FACTOR_BITS * (rows + columns))),
        rounding=rounding,
    )


def rounding_energy(values: Tensor) -> float:
    """Return the energy of a rounding error spread evenly over the last place: the sum of ulp^2 / 12."""
    mantissa, exponent = torch.frexp(values.detach().cpu().float())
    ulp = torch.finfo(values.dtype).eps * torch.ldexp(mantissa.sign(), exponent - 1)
    return float(ulp.square_().sum(dtype=torch.float64)) / 12


def within_budget(shapes: Mapping[str, Sequence[int]], budget: int = BUDGET) -> set[str]:
    """Return the names of matrices whose spectra can be measured for `budget` multiply-adds.

    All of them where that is enough; else as many as fit, taken evenly from the whole list.
    """
    names, chosen = list(shapes), set[str]()
    for index in _spread(len(names)):
        cost = _cost(shapes[names[index]])
        if cost <= budget:
            budget -= cost
            chosen.add(names[index])
    return chosen


def _spread(count: int) -> list[int]:
    """Return 0 .. count-1 by their reversed bits, so that every prefix covers the whole range."""
    width = max(1, (count - 1).bit_length())
    return sorted(range(count), key=lambda index: f"{index:0{width}b}"[::-1])


def _cost(shape: Sequence[int]) -> int:
    rows, columns = matrix_shape(shape)
    side = min(rows, columns)
    return rows * columns * side + _EIGEN * side**3


def _gram(matrix: Tensor) -> Tensor:
    """Return the product of a matrix with itself along its longer side, float64.

    Its eigenvalues are the squares of the singular values; float64 leaves them good to 1e-15 of the greatest.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64)
    for start in range(0, len(tall), _ROWS):
        wide = tall[start : start + _ROWS].double()
        gram.addmm_(wide.t(), wide)
    return gram
