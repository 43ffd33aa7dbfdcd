"""ImPart: singular vectors, thinned out by importance."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.drop import Values
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, check_type
from dtrain.stages import (
    LowRank,
    Packed,
    Payload,
    Pipeline,
    encode,
    matrix_shape,
    random_mask,
    singular_factors,
    value_bits,
    value_format,
)

_LADDER = 4  # rates per factor of two: a rate costs no bytes where other tensors use it as well


@dataclass(frozen=True)
class ImPart(Method):
    """Keep random entries of the singular vectors, more of the important ones (ImPart).

    An entry of the k-th pair of vectors is dropped with probability `p_k = gamma * (1 - s_k / s_1)` and divided by
    1 - p_k otherwise; the share `beta` of the smallest singular values is dropped altogether.

    * **Source**: Yang et al., "ImPart", arXiv 2504.13237, section 3. The drop probabilities, the pruned tail and the
      rescaling are certain. gamma is solved for from `keep`; where even gamma = 1 keeps too much, more of the tail is
      pruned (a reading). Rates are rounded to a ladder of four per factor of two, so that neighbours share a mask.
    * **Data needed**: none; the paper tunes beta on validation data.
    * **Bits per parameter**: nominal 16 * keep; on disk the same to within 10 % or one pair of vectors, for rates are
      rounded. The masks are seeds.
    * **When it fails**: deltas of full fine-tuning have a flat spectrum; two masks, of u_k and v_k, square the noise.

    Args:
        keep: Kept entries of singular vectors, as a share of the delta's elements, in (0, 2]: a square matrix has twice
            as many such entries as elements.
        beta: Share of the singular values that is dropped from the tail, in [0, 1).
        seed: Seed of the masks. They cost no bytes: they are drawn again from the seed and the tensor's name.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 0.1
    beta: float = 0.0
    seed: int = 0
    values: Values = "float16"
    paper: ClassVar[str] = "arXiv 2504.13237"

    def __post_init__(self) -> None:
        check_type("keep", self.keep, float)
        if not 0 < self.keep <= 2:
            raise InputError(f"`keep` must be in (0, 2], got {self.keep}. Use keep=0.01 for 0.16 bit per parameter.")
        check_type("seed", self.seed, int)
        check_type("beta", self.beta, float)
        if not 0 <= self.beta < 1:
            raise InputError(f"`beta` must be in [0, 1), got {self.beta}. Use beta=0 to keep the tail.")
        _ = value_format(self.values), random_mask("bernoulli", 0.5, self.seed)

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: kept entries times the bits of a value."""
        return self.keep * value_bits(value_format(self.values))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return one payload per run of singular values that are kept at the same rate."""
        if not delta.numel():
            return ()
        factors, payloads = singular_factors(delta), list[Payload]()
        rates = self._rates(delta, factors)
        stop = 0
        for band, (rate, run) in enumerate(groupby(float(rate) for rate in rates)):
            first, stop = stop, stop + len(list(run))
            select = random_mask("bernoulli", rate, (self.seed + band) % (1 << 64))  # bands share no mask
            pipeline = Pipeline(select, value_format(self.values), Packed(), LowRank(stop - first, first))
            payload = encode(pipeline, name, delta, coefficients=factors[first:stop])
            payloads.append(replace(payload, scale=payload.scale / rate**2))
        return tuple(payloads)

    def _rates(self, delta: Tensor, factors: Tensor) -> Tensor:
        """Return the rate (float64) at which the entries of every singular vector are kept; the tail is cut off."""
        rows, columns = matrix_shape(delta.shape)
        u, v = (part.double().square().sum(1) for part in (factors[:, :rows], factors[:, rows:]))
        size = (u * v).sqrt()  # the singular values: a pair's length, however it is shared out
        wanted = self.keep * rows * columns / (rows + columns)  # in pairs of vectors
        importance = size / size[0].clamp_min(1e-300)
        # At gamma = 1 a pair is kept at the rate of its importance: so many pairs can be afforded.
        affordable = int((importance.cumsum(0) <= wanted).sum())
        count = max(1, min(affordable, math.ceil((1 - self.beta) * len(size))))
        loss = 1 - importance[:count]
        gamma = min(1.0, max(0.0, count - wanted) / max(float(loss.sum()), 1e-300))
        rates = 1 - gamma * loss
        return self._ladder(rates * min(1.0, wanted / float(rates.sum())))

    @staticmethod
    def _ladder(rates: Tensor) -> Tensor:
        steps = (rates.clamp_min(2.0**-20).log2() * _LADDER).round() / _LADDER
        return steps.clamp_max(0.0).exp2()
