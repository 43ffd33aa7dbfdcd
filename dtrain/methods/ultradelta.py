"""UltraDelta: prune at random within each level of a quantised delta."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Deltas, Encoder, Method, check_keep, check_type
from dtrain.stages import Affine, All, Indexed, Payload, Pipeline, Rans, blocks, encode, matrix_shape, random_order
from dtrain.stages.philox import stream_key, words


class Share(NamedTuple):
    """What one tensor gets: the share of its elements that is kept, and the correction of its scale."""

    keep: float
    gamma: float


@dataclass(frozen=True)
class UltraDelta(Method):
    """Quantise, prune at random within each level, keep more where deltas vary more, and shrink the scale (UltraDelta).

    Tensors are sorted by the standard deviation of their delta into three groups that keep `keep * (1 - step)`, `keep`
    and `keep * (1 + step)`. Elements are quantised uniformly; of every level the same share is kept; the rest is scaled
    by gamma / share, with gamma from 1 down to `gamma` as the trace norm grows.

    * **Source**: Wang et al., "UltraDelta", arXiv 2505.13563, section 3. Three groups by standard deviation, pruning
      within levels and gamma in [0.5, 1], falling with the trace norm, are certain. That the groups are equally many
      tensors, that gamma falls linearly and that a level keeps its share to within one element are readings.
    * **Data needed**: none.
    * **Bits per parameter**: nominal bits * keep (as in the paper's second version; its third counts the positions
      too); on disk keep * H(codes) + H(keep), less what level 0 would take, since what is pruned is no seed.
    * **When it fails**: the positions cost more than the values: a seeded mask of signs at the same bytes keeps about
      six times as many elements.

    Args:
        keep: Share of the elements that the middle group keeps, in (0, 1].
        step: How much more and less the outer groups keep, as a share of `keep`, in [0, 1).
        bits: Bits of a level before pruning, 1 to 12.
        gamma: Correction of the scale for the greatest trace norm, in (0, 1]; 1 for none.
        seed: Seed of the choice. The positions are stored, so decoding does not need it.

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 0.1
    step: float = 0.5
    bits: int = 4
    gamma: float = 0.5
    seed: int = 0
    paper: ClassVar[str] = "arXiv 2505.13563"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, kind in (("step", float), ("gamma", float), ("bits", int), ("seed", int)):
            check_type(name, getattr(self, name), kind)
        if not (0 <= self.step < 1 and 0 < self.gamma <= 1 and 1 <= self.bits <= 12 and 0 <= self.seed < 1 << 64):
            raise InputError(
                "`step` must be in [0, 1), `gamma` in (0, 1], `bits` in [1, 12], `seed` in [0, 2**64); got "
                f"{self.step}, {self.gamma}, {self.bits}, {self.seed}."
            )

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: values only."""
        return self.bits * self.keep

    def plan(self, deltas: Deltas) -> Encoder:
        """Give every tensor its share and its gamma, by the standard deviations and trace norms of all."""
        spread: dict[str, float] = {}
        trace: dict[str, float] = {}
        for name, get in deltas:
            matrix = get().double()
            matrix = matrix.reshape(matrix_shape(matrix.shape))
            spread[name] = float(matrix.std(correction=0)) if matrix.numel() else 0.0
            trace[name] = _trace_norm(matrix)
        least, most = min(trace.values(), default=0.0), max(trace.values(), default=0.0)
        order = sorted(spread, key=lambda name: (spread[name], name))
        shares = {
            name: Share(
                min(1.0, self.keep * (1 + self.step * ((6 * rank + 3) // (2 * len(order)) - 1))),
                1 - (1 - self.gamma) * (trace[name] - least) / (most - least or 1.0),
            )
            for rank, name in enumerate(order)
        }
        return partial(self._encode, shares)

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the kept values of one tensor by itself: the middle group, no correction of the scale."""
        return self._encode({}, name, delta)

    def _encode(
        self, shares: dict[str, Share], name: str, delta: Tensor, inputs: Inputs | None = None
    ) -> tuple[Payload, ...]:
        keep, gamma = shares.get(name, Share(self.keep, 1.0))
        quantise, flat = Affine(self.bits), delta.reshape(-1).cpu()
        if keep == 1 or not flat.numel():
            payload = encode(Pipeline(All(), quantise), name, delta)
            return (replace(payload, scale=payload.scale * gamma),)
        everywhere = blocks(0, flat.numel(), None)
        levels = quantise.levels(flat, everywhere)
        codes = quantise.encode(flat, everywhere, levels).symbols
        positions = self._within_levels(name, codes, keep)
        positions = positions[codes[positions] != int(levels.zero)]  # a 0 need not be stored
        payload = encode(Pipeline(Indexed(), quantise, Rans()), name, delta, positions=positions, levels=levels)
        return (replace(payload, scale=payload.scale * gamma / keep),)

    def _within_levels(self, name: str, codes: Tensor, keep: float) -> Tensor:
        """Return the positions of a random share `keep` of every level, to within one element.

        Every 1/keep-th of all elements, sorted by level and at random within each, counted from a random start: so an
        element of a level that has few is kept with the same chance as any other.
        """
        by_level = random_order(self.seed, name, codes)
        start = int(words(stream_key(self.seed, f"{name}\0start"), 0, 4)[0])
        total = torch.arange(codes.numel() + 1) * round(keep * 2**32) + start >> 32
        return by_level[torch.diff(total) > 0].sort().values


def _trace_norm(matrix: Tensor) -> float:
    """Return the sum of the singular values: the roots of the eigenvalues of the smaller Gram matrix."""
    side = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    return float(cast("Tensor", torch.linalg.eigvalsh(side @ side.t())).clamp_min(0).sqrt().sum())
