"""DARE: drop and rescale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from dtrain.methods.drop import Mask, RandomDrop, Values
from dtrain.methods.inputs import Inputs
from dtrain.stages import Payload, Pipeline, random_mask, value_format


@dataclass(frozen=True)
class Dare(RandomDrop):
    """Keep a random share of the delta and divide it by that share (DARE).

    `D_hat = (M * D) / keep` with `M ~ Bernoulli(keep)` per element: unbiased, with a variance that grows as 1/keep.

    * **Source**: Yu et al., "Language Models are Super Mario", arXiv 2311.03099, section 3.1; certain from their code.
      The stratified mask and the short value formats are ours.
    * **Data needed**: none.
    * **Bits per parameter**: nominal 16 * keep; on disk the same, since the mask is a seed.
    * **When it fails**: the stratified mask is unbiased only where 1/keep (above one half: 1/(1-keep)) is an integer;
      at keep=0.4 some positions are kept at 0.36. Below a keep rate of about 0.01, or on large deltas (continued
      pre-training), 1/keep blows up the noise; use `DareX`.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        mask: "bernoulli" keeps each element independently; "stratified" keeps one out of every 1/keep neighbours.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".

    Raises:
        InputError: If an argument is out of its range.
    """

    mask: Mask = "bernoulli"
    values: Values = "float16"
    paper: ClassVar[str] = "arXiv 2311.03099"

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        return Pipeline(random_mask(self.mask, self.keep, self.seed), value_format(self.values))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the kept values, scaled by 1/keep."""
        payload = self.unscaled(name, delta)
        return (replace(payload, scale=payload.scale / self.keep),)
