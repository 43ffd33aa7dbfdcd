"""Magnitude pruning of the delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.methods.drop import Values, with_norm_of
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, check_choice, check_keep
from dtrain.methods.top import nonzero_at, top_positions
from dtrain.stages import All, Indexed, Packed, Payload, Pipeline, Rans, encode, value_bits, value_format


def encode_at(positions: Tensor, keep: float, values: Values, name: str, delta: Tensor) -> Payload:
    """Encode the values at `positions`, and these as well; `keep=1` stores all values and no positions."""
    select, positions = All() if keep == 1 else Indexed(), nonzero_at(delta, positions)
    # The levels of a uniform quantiser are not equally likely; but a short stream is not worth a coder's table.
    codes = (Packed(), Rans()) if values.startswith("uniform") else (Packed(),)
    payloads = [
        encode(Pipeline(select, value_format(values), code), name, delta, positions=positions) for code in codes
    ]
    return min(payloads, key=lambda payload: payload.data.numel())


@dataclass(frozen=True)
class Magnitude(Method):
    """Keep the elements of the delta that are greatest in magnitude (MP).

    `D_hat = M * D`, where M holds the share `keep` of every tensor that has the greatest |D|; nothing is rescaled.

    * **Source**: magnitude pruning is folklore; on deltas as in Deng et al., "DARE the Extreme", arXiv 2410.09344,
      section 5. Per tensor, and without rescaling, is certain from there. Coding positions and values is ours.
    * **Data needed**: none.
    * **Bits per parameter**: nominal 16 * keep; on disk 16 * keep + H(keep), since these positions are no seed: 0.24
      instead of 0.16 at keep=0.01.
    * **When it fails**: on small deltas below a keep rate of about 0.1: what is left is biased towards few weights.
      It is the method for large deltas (continued pre-training), where random dropping collapses.

    Args:
        keep: Share of every tensor's elements that is kept, in (0, 1].
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".
        rescale: "none", or "norm" to keep every tensor's Frobenius norm (ours).

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 0.1
    values: Values = "float16"
    rescale: Literal["none", "norm"] = "none"
    paper: ClassVar[str] = "arXiv 2410.09344, section 5"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choice("rescale", self.rescale, ("none", "norm"))
        _ = value_format(self.values)

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: keep times the bits of a value."""
        return self.keep * value_bits(value_format(self.values))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the greatest values and their positions."""
        positions = top_positions(delta.abs().reshape(1, -1), round(self.keep * delta.numel()))
        payload = encode_at(positions, self.keep, self.values, name, delta)
        return (with_norm_of(delta, name, payload) if self.rescale == "norm" else payload,)
