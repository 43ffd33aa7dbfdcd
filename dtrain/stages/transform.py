"""Transform: the coefficients in which a change is stored, always a matrix of `grid` (rows, columns).

A tensor of more than two dimensions is seen as a matrix of its first dimension (outputs) by all others (inputs).
Sums are taken in float64 and rounded once to float32, so that the order in which a library adds does not show.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from dtrain.errors import InputError

Grid = tuple[int, int]
MAX_PATCH = 128
_NULL = 2.0**-20  # of the greatest singular value
_NOISE = 2.0**-40  # of the greatest entry of a singular vector


def matrix_shape(shape: Sequence[int]) -> Grid:
    """Return (outputs, inputs) of a tensor; a vector is one row."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


@dataclass(frozen=True)
class Plain:
    """The values themselves."""

    tag: ClassVar[int] = 0
    layout: ClassVar[str] = ""
    degree: ClassVar[int] = 1

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return the rows and columns of the coefficients of a tensor of this shape."""
        return matrix_shape(shape)

    def forward(self, values: Tensor) -> Tensor:
        """Return the coefficients, of shape `grid`, of float32 `values` of any shape."""
        return values.reshape(matrix_shape(values.shape))

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values, of shape (n,), of `coefficients` of shape `grid`."""
        return coefficients.reshape(-1)


@dataclass(frozen=True)
class BlockDct(Plain):
    """Orthonormal two-dimensional DCT-II of patches; a row of the grid is a patch, read row by row.

    A matrix whose sides are no multiples of `patch` is filled up with zeros.

    Args:
        patch: Side of a patch, 2 to 128.
    """

    patch: int
    tag: ClassVar[int] = 1
    layout: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        if not 2 <= self.patch <= MAX_PATCH:
            raise InputError(f"`patch` must be in [2, {MAX_PATCH}], got {self.patch}. Use patch=16.")

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return (number of patches, values of a patch)."""
        rows, columns = matrix_shape(shape)
        return -(-rows // self.patch) * -(-columns // self.patch), self.patch**2

    def forward(self, values: Tensor) -> Tensor:
        """Return one row of coefficients per patch."""
        p = self.patch
        matrix = values.reshape(matrix_shape(values.shape))
        rows, columns = matrix.shape
        padded = torch.nn.functional.pad(matrix, (0, -columns % p, 0, -rows % p))
        patches = padded.double().view(padded.shape[0] // p, p, padded.shape[1] // p, p).transpose(1, 2)
        basis = _dct(p).to(values.device)
        return (basis @ patches @ basis.t()).reshape(-1, p * p).float()

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values, of shape (n,), of one row of coefficients per patch."""
        p = self.patch
        rows, columns = matrix_shape(shape)
        basis = _dct(p).to(coefficients.device)
        patches = basis.t() @ coefficients.double().view(-(-rows // p), -(-columns // p), p, p) @ basis
        whole = patches.float().transpose(1, 2).reshape(-(-rows // p) * p, -(-columns // p) * p)
        return whole[:rows, :columns].reshape(-1)


@dataclass(frozen=True)
class LowRank(Plain):
    """Factors of a product: row k of the grid is the column u_k and the row v_k, and the values are sum_k u_k v_k.

    A singular value decomposition, with each singular value shared out so that u_k and v_k have the same greatest
    magnitude: then one quantiser suits both.

    Args:
        rank: Number of terms.
        first: The singular value to begin with, the greatest being number 0. Decoding does not need it.
    """

    rank: int
    first: int = 0
    tag: ClassVar[int] = 2
    layout: ClassVar[str] = "II"
    degree: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"`rank` must be at least 1, got {self.rank}.")

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return (rank, rows + columns); the rank is no greater than the shorter side.

        Raises:
            InputError: If it is.
        """
        rows, columns = matrix_shape(shape)
        if self.first + self.rank > min(rows, columns):
            raise InputError(
                f"`first` + `rank` is {self.first + self.rank}, but a tensor of shape {tuple(shape)} has only "
                f"{min(rows, columns)} singular values. Use a smaller rank."
            )
        return self.rank, rows + columns

    def forward(self, values: Tensor) -> Tensor:
        """Return the factors of the best approximation of this rank."""
        self.grid(values.shape)  # refuses a rank the matrix does not have
        return singular_factors(values)[self.first : self.first + self.rank]

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values, of shape (n,), of the product."""
        rows = matrix_shape(shape)[0]
        u, v = coefficients[:, :rows].double(), coefficients[:, rows:].double()
        return (u.t() @ v).float().reshape(-1)


@dataclass(frozen=True)
class Transposed(Plain):
    """The transposed matrix, so that its rows are the inputs."""

    tag: ClassVar[int] = 3

    def grid(self, shape: Sequence[int]) -> Grid:
        """Return (inputs, outputs)."""
        rows, columns = matrix_shape(shape)
        return columns, rows

    def forward(self, values: Tensor) -> Tensor:
        """Return the transposed matrix."""
        return values.reshape(matrix_shape(values.shape)).t().contiguous()

    def inverse(self, coefficients: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the values, of shape (n,), in the order of the tensor."""
        return coefficients.t().reshape(-1)


Transform = Plain | BlockDct | LowRank | Transposed


def singular_factors(values: Tensor) -> Tensor:
    """Return all singular vectors as float32 rows [u_k, v_k] whose products add up to `values`, the greatest first.

    From the eigenvectors of the smaller Gram matrix in float64, several times faster than a singular value
    decomposition: the vectors of one side are orthonormal, those of the other are the matrix times these, so that the
    sum of all products is exact whatever the eigenvalues are. But pairs below 2**-20 of the greatest are set to 0: they
    are rounding errors, and which basis of them comes out depends on the library and its threads.
    """
    matrix = values.reshape(matrix_shape(values.shape)).double()
    tall = matrix.shape[0] > matrix.shape[1]
    side = matrix.t() if tall else matrix
    _, vectors = cast("tuple[Tensor, Tensor]", torch.linalg.eigh(side @ side.t()))
    near = vectors.t().flip(0)
    far = near @ side
    size = far.square().sum(1, keepdim=True).sqrt()
    far = far.where(size > _NULL * size.amax(0), 0.0)
    return balanced(far, near) if tall else balanced(near, far)


def balanced(u: Tensor, v: Tensor) -> Tensor:
    """Return float32 rows [u_k, v_k] whose halves have the same greatest magnitude and the same products.

    Args:
        u: Shape (rank, rows).
        v: Shape (rank, columns).
    """
    size_u, size_v = (part.abs().amax(1, keepdim=True).clamp_min(1e-300) for part in (u.double(), v.double()))
    # The sign of a singular vector is arbitrary and depends on the library: the greatest entry of v is made positive.
    sign = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()
    share = sign * (size_v / size_u).sqrt()
    rows = torch.cat([u * share, v / share.where(share != 0, torch.ones_like(share))], dim=1)
    # What should be 0 is noise, and even the sign of a zero would depend on the library and its threads.
    return rows.where(rows.abs() > _NOISE * rows.abs().amax(1, keepdim=True), 0.0).float()


@functools.lru_cache(maxsize=8)
def _dct(size: int) -> Tensor:
    """Return the orthonormal DCT-II: row k is c_k cos(pi (2 i + 1) k / (2 size)), float64."""
    k = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(math.pi / (2 * size) * (2 * k + 1) * k[:, None]) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis
