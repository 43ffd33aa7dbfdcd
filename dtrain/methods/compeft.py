"""ComPEFT: the signs of the greatest elements."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.accounting import binary_entropy
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Deltas, Encoder, Method, check_choice, check_keep, check_type
from dtrain.methods.top import nonzero_at, top_positions, top_threshold
from dtrain.stages import All, Indexed, Payload, Pipeline, Sign, encode


@dataclass(frozen=True)
class ComPEFT(Method):
    """Keep the signs of the greatest elements, all with one magnitude (ComPEFT).

    `D_hat = alpha * std(D) * M * sign(D)`, where M holds the share `keep` of greatest |D|: three values.

    * **Source**: Yadav et al., "ComPEFT", arXiv 2311.13171, section 2. The formula is certain. That the greatest are
      chosen among all elements of the model is a reading (`scope="model"`), that each tensor has its own std is ours:
      one std for layers of different sizes would be no better in any way, and scales are next to free.
    * **Data needed**: none here; the paper tunes alpha on validation data.
    * **Bits per parameter**: nominal keep + H(keep), the entropy of the ternary code; on disk the same.
    * **When it fails**: below a keep rate of about 0.05 on small deltas. Made for adapters, whose deltas are few.

    Args:
        keep: Share of the elements that is kept, in (0, 1].
        alpha: Magnitude of a kept element, in standard deviations of its tensor's delta.
        scope: Choose among the elements of the whole "model", or in every "tensor" by itself.

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 0.1
    alpha: float = 1.0
    scope: Literal["model", "tensor"] = "model"
    paper: ClassVar[str] = "arXiv 2311.13171"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_type("alpha", self.alpha, float)
        check_choice("scope", self.scope, ("model", "tensor"))
        if not 0 < self.alpha < math.inf:
            raise InputError(f"`alpha` must be a positive number, got {self.alpha}. Use alpha=1.")

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: the entropy of three values."""
        return self.keep + binary_entropy(self.keep)

    def plan(self, deltas: Deltas) -> Encoder:
        """Find the threshold of the whole model, where that is the scope."""
        if self.scope == "tensor" or self.keep == 1:
            return self.encode
        return partial(self._encode, top_threshold(deltas, self.keep))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the signs of the tensor's own greatest elements."""
        return self._signs(name, delta, top_positions(delta.abs().reshape(1, -1), round(self.keep * delta.numel())))

    def _encode(self, threshold: float, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        return self._signs(name, delta, (delta.abs().reshape(-1) >= threshold).nonzero().view(-1))

    def _signs(self, name: str, delta: Tensor, positions: Tensor) -> tuple[Payload, ...]:
        positions = nonzero_at(delta, positions)
        select = All() if positions.numel() == delta.numel() else Indexed()
        payload = encode(Pipeline(select, Sign()), name, delta, positions=positions)
        std = float(delta.double().std(correction=0)) if delta.numel() else 0.0
        return (replace(payload, scale=self.alpha * std),)
