"""Delta-CoMe: singular vectors with mixed precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.gptq import gptq, inverse_root
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, Needs, check_flag, check_numbers, check_type
from dtrain.stages import (
    Affine,
    All,
    Levels,
    LowRank,
    Packed,
    Payload,
    Pipeline,
    blocks,
    encode,
    matrix_shape,
    singular_factors,
)


class Band(NamedTuple):
    """Bits per entry, the first singular value, and how many."""

    bits: int
    first: int
    rank: int


@dataclass(frozen=True)
class DeltaCoMe(Method):
    """Keep singular vectors of the delta, the first with many bits and the later ones with few (Delta-CoMe).

    The singular values are in bands: the first `ranks[0]` get `bits[0]` bits per entry of their two vectors, and so
    on; the last band goes on until `budget` bits per parameter are spent. The rest is dropped.

    * **Source**: Ping et al., "Delta-CoMe", arXiv 2406.08903, section 3. Bands of 8, 3 and 2 bits at one bit per
      parameter, and GPTQ for V and then for U, are certain; that each band is rounded by itself is a reading.
      Rounding to the nearest level, without data, is our default.
    * **Data needed**: none; with gptq=True a calibration.
    * **Bits per parameter**: nominal `budget`; on disk 2 % (bands of 8 bits) to 7 % (of 2) more, for the step and the
      zero of every block.
    * **When it fails**: deltas of full fine-tuning have a flat spectrum: at one bit per parameter much of the energy is
      beyond the last band. It is the method for deltas of low rank.

    Args:
        bits: Bits per entry of each band, 1 to 16.
        ranks: Singular values of each band but the last.
        budget: Bits per parameter spent on entries, all bands together.
        block: Entries that share a step and a zero.
        gptq: Whether to round by GPTQ, against the inputs of each layer, instead of to the nearest level.

    Raises:
        InputError: If an argument is out of its range.
    """

    bits: Sequence[int] = (8, 3, 2)
    ranks: Sequence[int] = (2, 32)
    budget: float = 1.0
    block: int = 128
    gptq: bool = False
    paper: ClassVar[str] = "arXiv 2406.08903"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_numbers("bits", self.bits, int))
        object.__setattr__(self, "ranks", check_numbers("ranks", self.ranks, int))
        check_type("budget", self.budget, float)
        check_type("block", self.block, int)
        check_flag("gptq", self.gptq)
        if len(self.bits) != len(self.ranks) + 1 or min(self.ranks, default=0) < 0:
            raise InputError(f"`ranks` must be one less than `bits`, none negative; got {self.ranks} for {self.bits}.")
        if not (0 < self.budget < math.inf and 2 <= self.block < 1 << 32):
            raise InputError(
                f"`budget` must be a positive number, `block` 2 or more; got {self.budget} and {self.block}."
            )
        for bits in self.bits:
            _ = Affine(bits, self.block)

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: entries only."""
        return float(self.budget)

    @property
    def needs(self) -> Needs:
        """The covariance of every layer's inputs for GPTQ; nothing otherwise."""
        return "covariance" if self.gptq else "nothing"

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return one payload per band; none where the budget is less than one singular value."""
        if not self._bands(delta, min(matrix_shape(delta.shape))):
            return ()
        factors = singular_factors(delta).cpu()  # where levels and GPTQ's Gram matrix are
        bands = self._bands(delta, int(factors.any(1).sum()))  # nothing is spent beyond the delta's rank
        frames = [self._levels(factors, band) for band in bands]
        if self.gptq:
            factors = self._compensated(factors, bands, frames, matrix_shape(delta.shape)[0], inputs)
        payloads: list[Payload] = []
        for (bits, first, rank), levels in zip(bands, frames, strict=True):
            pipeline = Pipeline(All(), Affine(bits, self.block), Packed(), LowRank(rank, first))
            part = factors[first : first + rank]
            payloads.append(encode(pipeline, name, delta, coefficients=part, levels=levels))
        return tuple(payloads)

    def _levels(self, factors: Tensor, band: Band) -> Levels:
        part = factors[band.first : band.first + band.rank].reshape(-1)
        return Affine(band.bits, self.block).levels(part, blocks(self.block, part.numel(), None))

    def _compensated(
        self, factors: Tensor, bands: Sequence[Band], frames: Sequence[Levels], rows: int, inputs: Inputs | None
    ) -> Tensor:
        """Return the factors rounded by GPTQ: first V against the layer's inputs, then U against what V makes of them.

        A tensor that is no layer's weight gets the identity for its inputs.
        """
        left, right = slice(None, rows), slice(rows, None)  # u_k, v_k
        outer, inner = (right, left) if inputs is not None and inputs.transposed else (left, right)
        width = factors[:, inner].shape[1]
        gram = torch.eye(width, dtype=torch.float64)
        if inputs is not None and inputs.gram is not None:
            gram = inputs.gram.double()
        root, rounded = inverse_root(gram), factors.double().clone()
        for band, levels in zip(bands, frames, strict=True):
            chosen = slice(band.first, band.first + band.rank)
            top = Affine(band.bits, self.block).top
            step, zero = (part.view(band.rank, -1) for part in (levels.step, levels.zero))
            v = gptq(factors[chosen, inner], root, step[:, inner], zero[:, inner], top)
            rounded[chosen, inner] = v
            seen = inverse_root(v @ gram @ v.t())
            u = gptq(factors[chosen, outer].t(), seen, step[:, outer].t(), zero[:, outer].t(), top)
            rounded[chosen, outer] = u.t()
        return rounded.float()

    def _bands(self, delta: Tensor, most: int) -> list[Band]:
        """Return the bands that the budget allows, of `most` singular values together."""
        rows, columns = matrix_shape(delta.shape)
        left, first = self.budget * rows * columns, 0
        bands: list[Band] = []
        for bits, wanted in zip(self.bits, (*self.ranks, most), strict=True):
            rank = min(wanted, most - first, int(left // (bits * (rows + columns) or 1)))
            if rank > 0:
                bands.append(Band(bits, first, rank))
                first, left = first + rank, left - rank * bits * (rows + columns)
        return bands
