"""BitDelta: one bit per weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, check_choice
from dtrain.methods.seeded_sign import SeededSign
from dtrain.stages import All, Packed, Payload, Pipeline, Sign, Transposed, encode, matrix_shape


@dataclass(frozen=True)
class BitDelta(Method):
    """Keep the sign of every element, and the mean magnitude of each tensor, row or column (BitDelta).

    `D_hat = a * sign(D)` with `a = mean |D|`, the scale of least squared error; the sign of 0 is taken as -1.

    * **Source**: Liu et al., "BitDelta", arXiv 2402.10193, section 3.1; certain. One scale per row or column is
      "Per-Axis", arXiv 2512.19720; in half precision, relative to the tensor's, is ours. Their distillation of the
      scales is not part of this preset.
    * **Data needed**: none.
    * **Bits per parameter**: 1, nominally and on disk; with scale="row" 16/columns more, with "column" 16/rows.
    * **When it fails**: it cannot go below one bit. On heavy tails all elements get the same magnitude.

    Args:
        scale: One scale per "tensor", "row" (output) or "column" (input).

    Raises:
        InputError: If `scale` is none of these.
    """

    scale: Literal["tensor", "row", "column"] = "tensor"
    paper: ClassVar[str] = "arXiv 2402.10193; 2512.19720"

    def __post_init__(self) -> None:
        check_choice("scale", self.scale, ("tensor", "row", "column"))

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: one."""
        return 1.0

    def at_share(self, share: float) -> Method:
        """Return what keeps the sign of a share of the weights: a bit each is the least that all of them take."""
        return SeededSign(keep=share) if share < 1 and self.scale == "tensor" else super().at_share(share)

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return all signs and their scale or scales."""
        rows, columns = matrix_shape(delta.shape)
        pipeline = {
            "tensor": Pipeline(All(), Sign()),
            "row": Pipeline(All(), Sign(columns)),
            "column": Pipeline(All(), Sign(rows), Packed(), Transposed()),
        }[self.scale]
        return (encode(pipeline, name, delta),)
