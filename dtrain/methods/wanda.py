"""Wanda on deltas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.methods.drop import Values
from dtrain.methods.inputs import Inputs
from dtrain.methods.magnitude import encode_at
from dtrain.methods.method import Method, Needs, check_keep
from dtrain.methods.top import top_share
from dtrain.stages import Payload, value_bits, value_format


@dataclass(frozen=True)
class Wanda(Method):
    """Keep the elements of the delta that change their output most: magnitude times the norm of the input (Wanda).

    The score of D_ij is |D_ij| * ||x_j||, compared within each output row; nothing is rescaled.

    * **Source**: the score is Sun et al., arXiv 2306.11695, section 3; on deltas Deng et al., "DARE the Extreme", arXiv
      2410.09344, section 5. That rows are compared within themselves, as for weights, is a reading.
    * **Data needed**: a calibration: a few batches of inputs without labels. A tensor that is no layer's weight (an
      embedding) has no inputs: there the score is |D| alone, in the tensor as a whole.
    * **Bits per parameter**: nominal 16 * keep; on disk 16 * keep + H(keep), since these positions are no seed.
    * **When it fails**: like `Magnitude`, on small deltas at low keep rates. It is the method for large deltas.

    Args:
        keep: Share of the elements that is kept, in (0, 1]: the same number in every row, to within one.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".

    Raises:
        InputError: If an argument is out of its range.
    """

    keep: float = 0.1
    values: Values = "float16"
    paper: ClassVar[str] = "arXiv 2306.11695; 2410.09344 (reading)"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        _ = value_format(self.values)

    @property
    def needs(self) -> Needs:
        """The inputs of every layer."""
        return "inputs"

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: keep times the bits of a value."""
        return self.keep * value_bits(value_format(self.values))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the values of the greatest scores and their positions."""
        if inputs is None:
            score = delta.reshape(1, -1).abs()
        else:
            score = inputs.matrix(delta).abs() * inputs.norms.to(delta.device)
        positions = top_share(score.cpu(), self.keep)
        if inputs is not None and inputs.transposed:
            outputs, columns = score.shape  # the file's order is the tensor's: (inputs, outputs)
            positions = (positions % columns * outputs + positions // columns).sort().values
        return (encode_at(positions, self.keep, self.values, name, delta),)
