"""SeededSign, our own: a seeded mask and one bit per kept weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.methods.drop import Rescaled
from dtrain.stages import Pipeline, Sign, random_mask


@dataclass(frozen=True)
class SeededSign(Rescaled):
    """Keep the sign of one random weight out of every 1/keep, and one scale per tensor (ours).

    `D_hat = (a / q) * M * sign(D)` with the mean magnitude a of the kept weights and a stratified seeded mask: the mask
    of DeltaDQ, the values of BitDelta, the free scale of DAREx-q. Positions cost nothing, a value costs one bit.

    Which scale is right without looking at inputs hangs on the delta. q="keep" gives all weights the mean magnitude,
    too little for large ones, which move the output most; q="parallel", <D, D> / <D, D_hat>, makes up for that and
    adds noise: it is far better on MiniLM, and worse on a small ViT with a delta ten times as large. `fit=Search()` or
    `fit=Learn()` finds the scale from inputs.

    * **Source**: ours; the parts are from arXiv 2410.08666, 2402.10193 and 2410.09344.
    * **Data needed**: none; with q="search" an objective on *training* inputs.
    * **Bits per parameter**: keep, nominally and on disk.
    * **When it fails**: above about 0.5 bit per parameter, where an entropy coder (`Ecsq`) keeps more; on heavy tails,
      since all kept weights get the same magnitude.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1]; 1/32 and other 1/n give equal groups.
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        q: A number in (0, 1]; "keep" for q = keep, as DARE does; "norm" to keep every tensor's Frobenius norm;
            "parallel" to keep the part of it that lies along the delta; "search" to fit it to the objective.
        scope: One q for the "model", or one for every "layer" (tensor), found after the model's.
        search: "grid": a logarithmic grid, refined once around its best point; "golden": golden-section search.
        masks: Number of masks the objective is averaged over while searching. The file holds the first one.

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 1 / 32
    q: float | Literal["search", "norm", "parallel", "keep"] = "keep"
    paper: ClassVar[str] = "ours"

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        return Pipeline(random_mask("stratified", self.keep, self.seed), Sign())
