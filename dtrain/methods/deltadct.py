"""Delta-DCT: quantise patches in the frequency domain."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, check_choice, check_flag, check_numbers, check_type
from dtrain.stages import All, BlockDct, Mixed, Packed, Payload, Pipeline, decode, encode


@dataclass(frozen=True)
class DeltaDCT(Method):
    """Cut the delta into patches and give the strongest the most bits, in the frequency domain (Delta-DCT).

    Patches are ranked by their L2 norm within the tensor; each share of them gets its bits; the coefficients of an
    orthonormal two-dimensional DCT-II are rounded between the patch's minimum and maximum; patches of no bits are
    filled with their mean; at last the tensor is scaled by sum |D| / sum |D_hat|.

    * **Source**: Huang et al., "Seeing Delta Parameters as JPEG Images", arXiv 2503.06676, section 3. Ranking, bits,
      transform, filling and scale are certain. The patch size is not published; half precision for minimum, step and
      mean, and zeros around the edges, are readings.
    * **Data needed**: none.
    * **Bits per parameter**: nominal the mean of `bits` ("1-bit equivalent"); on disk, with the default bits and
      shares, 1.39 / 1.10 / 1.02 / 1.006 for patches of 8 / 16 / 32 / 64: minimum, step, mean and rank are counted.
    * **When it fails**: on deltas like white noise a DCT is only a rotation, and two bits between minimum and maximum
      are worse than one good sign (cosine 0.645 against 0.798 for `BitDelta`); on smooth ones one coefficient takes the
      whole range, which is worse still. It pays where the energy of the patches is uneven or the tails are heavy. The
      scale raises the squared error of the weights: it can be switched off.

    Args:
        patch: Side of a patch, 2 to 128.
        bits: Bits of each class of patches, 0 to 8, from the strongest class to the weakest.
        shares: Share of the patches in each class; they add up to 1.
        fill: What patches of no bits hold: their "mean", or "zero".
        rescale: Whether to scale each tensor to the delta's mean magnitude.

    Raises:
        InputError: If an argument is out of its range.
    """

    patch: int = 16
    bits: Sequence[int] = (2, 0)
    shares: Sequence[float] = (0.5, 0.5)
    fill: Literal["mean", "zero"] = "mean"
    rescale: bool = True
    paper: ClassVar[str] = "arXiv 2503.06676"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", check_numbers("bits", self.bits, int))
        object.__setattr__(self, "shares", check_numbers("shares", self.shares, float))
        check_type("patch", self.patch, int)
        check_choice("fill", self.fill, ("mean", "zero"))
        check_flag("rescale", self.rescale)
        if len(self.bits) != len(self.shares) or not all(0 <= bits <= 8 for bits in self.bits):
            raise InputError(f"`bits` must be 0 to 8, one per share; got {self.bits} and {self.shares}.")
        if not (min(self.shares, default=0) >= 0 and abs(sum(self.shares) - 1) <= 1e-6):
            raise InputError(f"`shares` must be shares of 1, got {self.shares}. Use shares=[0.5, 0.5].")
        _ = self.pipeline

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        return Pipeline(All(), Mixed(self.patch**2, self.fill == "mean"), Packed(), BlockDct(self.patch))

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: of the coefficients alone."""
        return sum(bits * share for bits, share in zip(self.bits, self.shares, strict=True))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the quantised patches."""
        coefficients = BlockDct(self.patch).forward(delta)
        # The transform is orthonormal: the norms are the patches'. In float64 their order is the same on every device.
        widths = self._widths(coefficients.square().sum(1, dtype=torch.float64))
        payload = encode(self.pipeline, name, delta, widths=widths, coefficients=coefficients)
        if self.rescale:
            size = float(delta.double().abs().sum())
            found = float(decode(payload, name, delta.shape).values.double().abs().sum()) * payload.scale
            payload = replace(payload, scale=payload.scale * size / found if found else payload.scale)
        return (payload,)

    def _widths(self, energy: Tensor) -> Tensor:
        """Return the bits of every patch."""
        order = torch.sort(energy, descending=True, stable=True).indices.cpu()
        widths, first, total = torch.zeros_like(order), 0, 0.0
        for bits, share in zip(self.bits, self.shares, strict=True):
            total += share
            last = math.floor(total * len(order) + 0.5)  # an odd patch goes to the stronger class
            widths[order[first:last]] = bits
            first = last
        return widths
