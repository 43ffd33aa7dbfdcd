"""DAREx with structural dropping: one coin for a whole column, row or block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtrain.errors import InputError
from dtrain.methods.drop import Rescaled, Values
from dtrain.methods.method import check_choice, check_type
from dtrain.stages import UNITS, All, Pipeline, Unit, Units, value_format


@dataclass(frozen=True)
class Structured(Rescaled):
    """Keep whole random columns, rows or blocks of the delta and divide them by q (DAREx, structural dropping).

    `D_hat = (M * D) / q` with one coin per unit. A column is an input of the layer: dropping it drops its part of
    every output. What is kept is dense, which kernels like.

    * **Source**: Deng et al., "DARE the Extreme", arXiv 2410.09344, table 9. That whole units are dropped is certain;
      the protocol is not published: which unit, the block's side and that q is found as for `DareX` are readings.
    * **Data needed**: as for `DareX`: an objective with q="search", none with a number or "norm".
    * **Bits per parameter**: nominal 16 * keep; on disk the same, since the mask is a seed.
    * **When it fails**: the noise of a unit's elements does not average out, so it needs a larger `keep` than `DareX`;
      a small tensor may lose all its units.

    Args:
        keep: Probability that a unit is kept, in [2**-24, 1].
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        q: A number in (0, 1]; "keep" for q = keep, as DARE does; "norm" to keep every tensor's Frobenius norm;
            "parallel" to keep the part of it that lies along the delta; "search" to fit it to the objective.
        scope: One q for the "model", or one for every "layer" (tensor), found after the model's.
        search: "grid": a logarithmic grid, refined once around its best point; "golden": golden-section search.
        masks: Number of masks the objective is averaged over while searching. The file holds the first one.
        unit: "column" (an input), "row" (an output) or "block" (a square).
        block: Side of a block, 2 to 1024; for unit="block" only.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".

    Raises:
        InputError: If an argument is out of its range.
    """

    q: float | Literal["search", "norm", "parallel", "keep"] = "search"
    unit: Unit = "column"
    block: int = 16
    values: Values = "float16"
    paper: ClassVar[str] = "arXiv 2410.09344, table 9"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        check_type("block", self.block, int)
        if self.unit == "block" and self.block < 2:
            raise InputError(f"`block` must be at least 2, got {self.block}. Use DareX for single elements.")
        super().__post_init__()

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        if self.keep == 1:
            return Pipeline(All(), value_format(self.values))
        side = self.block if self.unit == "block" else 1
        return Pipeline(Units(UNITS.index(self.unit), side, self.keep, self.seed), value_format(self.values))
