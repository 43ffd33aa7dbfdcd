"""What a weight matrix got to see: the statistics of its inputs that calibrated methods ask for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Inputs:
    """Statistics of the inputs of one weight matrix over all calibration tokens, on the CPU.

    The matrix has one row per output and one column per input: `matrix` views a weight or a delta that way.

    Args:
        norms: Root of the sum of squares of every input over all tokens, float32, shape (columns,): Wanda's ||x_j||.
        sample: At most 64 input rows spread evenly over the tokens, float32, shape (rows, columns).
        gram: X^T X over all tokens, float32, shape (columns, columns); None where it was not asked for.
        transposed: Whether the weight is stored as (inputs, outputs), as in the `Conv1D` of Hugging Face's GPT-2.
    """

    norms: Tensor
    sample: Tensor
    gram: Tensor | None = None
    transposed: bool = False

    def matrix(self, delta: Tensor) -> Tensor:
        """Return the weight's delta as (outputs, inputs), without a copy where its strides allow.

        A convolution's (outputs, channels, *kernel) is flattened to the columns of an unfolded input.
        """
        return delta.T if self.transposed else delta.flatten(1)
