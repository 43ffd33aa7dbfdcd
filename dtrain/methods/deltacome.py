"""Delta-CoMe: singular vectors with mixed precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, check_numbers, check_type
from dtrain.stages import Affine, All, LowRank, Packed, Payload, Pipeline, encode, matrix_shape, singular_factors


@dataclass(frozen=True)
class DeltaCoMe(Method):
    """Keep singular vectors of the delta, the first with many bits and the later ones with few (Delta-CoMe).

    The singular values are in bands: the first `ranks[0]` get `bits[0]` bits per entry of their two vectors, and so
    on; the last band goes on until `budget` bits per parameter are spent. The rest is dropped.

    * **Source**: Ping et al., "Delta-CoMe", arXiv 2406.08903, section 3. Bands of 8, 3 and 2 bits at one bit per
      parameter are certain. We round to the nearest level in blocks of 128 entries, where the paper uses GPTQ with
      calibration data: a reading that needs no data and loses somewhat more.
    * **Data needed**: none.
    * **Bits per parameter**: nominal `budget`; on disk 2 % (bands of 8 bits) to 7 % (of 2) more, for the step and the
      zero of every block.
    * **When it fails**: deltas of full fine-tuning have a flat spectrum: at one bit per parameter much of the energy is
      beyond the last band. It is the method for deltas of low rank.

    Args:
        bits: Bits per entry of each band, 1 to 16.
        ranks: Singular values of each band but the last.
        budget: Bits per parameter spent on entries, all bands together.
        block: Entries that share a step and a zero.

    Raises:
        InputError: If an argument is out of its range.
    """

    bits: Sequence[int] = (8, 3, 2)
    ranks: Sequence[int] = (2, 32)
    budget: float = 1.0
    block: int = 128
    source: ClassVar[str] = "arXiv 2406.08903"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_numbers("bits", self.bits, int))
        object.__setattr__(self, "ranks", check_numbers("ranks", self.ranks, int))
        check_type("budget", self.budget, float)
        check_type("block", self.block, int)
        if len(self.bits) != len(self.ranks) + 1 or min(self.ranks, default=0) < 0:
            raise InputError(f"`ranks` must be one less than `bits`, none negative; got {self.ranks} for {self.bits}.")
        if not (0 < self.budget < math.inf and self.block >= 2):
            raise InputError(
                f"`budget` must be a positive number, `block` 2 or more; got {self.budget} and {self.block}."
            )
        for bits in self.bits:
            _ = Affine(bits, self.block)

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: entries only."""
        return float(self.budget)

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return one payload per band; none where the budget is less than one singular value."""
        bands, payloads = self._bands(delta), list[Payload]()
        if not bands:
            return ()
        factors = singular_factors(delta)
        for bits, first, rank in bands:
            pipeline = Pipeline(All(), Affine(bits, self.block), Packed(), LowRank(rank, first))
            payloads.append(encode(pipeline, name, delta, coefficients=factors[first : first + rank]))
        return tuple(payloads)

    def _bands(self, delta: Tensor) -> list[tuple[int, int, int]]:
        """Return (bits, first singular value, how many) of every band that the budget allows."""
        rows, columns = matrix_shape(delta.shape)
        left, first = self.budget * rows * columns, 0
        bands: list[tuple[int, int, int]] = []
        for bits, wanted in zip(self.bits, (*self.ranks, min(rows, columns)), strict=True):
            rank = min(wanted, min(rows, columns) - first, int(left // (bits * (rows + columns) or 1)))
            if rank > 0:
                bands.append((bits, first, rank))
                first, left = first + rank, left - rank * bits * (rows + columns)
        return bands
