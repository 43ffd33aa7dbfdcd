"""DAREx-q: drop, and choose the rescaling."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.bound import bound_q
from dtrain.methods.drop import Mask, Rescaled, Values
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Needs, check_flag, check_type
from dtrain.stages import Payload, Pipeline, random_mask, value_format


@dataclass(frozen=True)
class DareX(Rescaled):
    """Keep a random share of the delta and divide it by a fitted q instead of that share (DAREx-q).

    `D_hat = (M * D) / q` with keep <= q <= 1: a larger q trades some of the mean of the change for much less noise.

    * **Source**: Deng et al., "DARE the Extreme", arXiv 2410.09344, section 4 and appendix E. That q is searched on
      labels (q_v) or on the change of the last hidden state (q_e), and that a layer's q minimises a Chernoff bound, is
      certain; searching on a *logarithmic* scale, over several masks, is ours, and so are the layer-wise search and the
      closed form of the bound's minimiser. The published code takes the signed sum in the bound (`signed=True`).
    * **Data needed**: with q="search" an objective on *training* inputs: `HiddenChange` (q_e) or `Metric` (q_v); with
      q="bound" a calibration. A number or "norm" needs none.
    * **Bits per parameter**: nominal 16 * keep; on disk the same.
    * **When it fails**: when almost nothing is kept of a large delta; and one batch can lead to an unlucky q.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        q: A number in (0, 1]; "keep" for q = keep, as DARE does; "norm" to keep every tensor's Frobenius norm;
            "parallel" to keep the part of it that lies along the delta; "search" to fit it to the objective; "bound"
            to minimise the Chernoff bound on the change of each layer's outputs. A tensor that is no layer's weight (an
            embedding) has no bound: it is divided by `keep`.
        scope: One q for the "model", or one for every "layer" (tensor), found after the model's.
        search: "grid": a logarithmic grid, refined once around its best point; "golden": golden-section search.
        masks: Number of masks the objective is averaged over while searching. The file holds the first one.
        mask: "bernoulli" keeps each element independently; "stratified" keeps one out of every 1/keep neighbours.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".
        eta: For q="bound": the bound's free parameter, in units of 1 / output. The paper searches it.
        signed: For q="bound": give rows whose sum is negative no rescaling, as the published code does.

    Raises:
        InputError: If an argument is out of its range.
    """

    q: float | Literal["search", "norm", "parallel", "keep", "bound"] = "search"
    mask: Mask = "bernoulli"
    values: Values = "float16"
    eta: float = 1.0
    signed: bool = False
    paper: ClassVar[str] = "arXiv 2410.09344"

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        return Pipeline(random_mask(self.mask, self.keep, self.seed), value_format(self.values))

    @property
    def needs(self) -> Needs:
        """An objective where q is searched, inputs for the bound; nothing otherwise."""
        return "inputs" if self.q == "bound" else super().needs

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the kept values, scaled by 1/q; where q is yet to be searched, they are not rescaled."""
        if self.q != "bound":
            return super().encode(name, delta, inputs)
        payload, q = self.unscaled(name, delta), self.keep
        if inputs is not None and self.keep < 1:
            q = bound_q(inputs.matrix(delta), inputs.sample, self.keep, self.eta, signed=self.signed)
        return (replace(payload, scale=payload.scale / q),)

    def _check_q(self) -> None:
        check_type("eta", self.eta, float)
        check_flag("signed", self.signed)
        if not 0 < self.eta < math.inf:
            raise InputError(f"`eta` must be a positive number, got {self.eta}. Start with eta=1.")
        if self.q != "bound":
            super()._check_q()
