"""DARE: drop and rescale."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.methods.method import Method, check_type
from dtrain.stages import Payload, Pipeline, encode, random_mask, value_format

Mask = Literal["bernoulli", "stratified"]
Values = Literal["float16", "bfloat16", "uniform8", "uniform4", "uniform2", "sign"]


@dataclass(frozen=True)
class RandomDrop(Method):
    """What `Dare` and `DareX` share: a seeded random mask, and a format for the values it keeps.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the masks. A mask costs no bytes: it is drawn again from the seed and the tensor's name.
        mask: "bernoulli" keeps each element independently; "stratified" keeps one out of every 1/keep neighbours.
        values: How kept values are stored: "float16", "bfloat16", "uniform8", "uniform4", "uniform2" or "sign".
    """

    keep: float = 0.1
    seed: int = 0
    mask: Mask = "bernoulli"
    values: Values = "float16"

    def __post_init__(self) -> None:
        check_type("keep", self.keep, float)
        check_type("seed", self.seed, int)
        _ = self.pipeline  # every stage checks its own parameters, now rather than after hours of training

    @property
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""
        return Pipeline(random_mask(self.mask, self.keep, self.seed), value_format(self.values))

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: keep times the bits of a value."""
        return self.keep * self.pipeline.quantise.bits

    def unscaled(self, name: str, delta: Tensor) -> Payload:
        """Return the kept values without any rescaling (q = 1)."""
        return encode(self.pipeline, name, delta)


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

    source: ClassVar[str] = "arXiv 2311.03099"

    def encode(self, name: str, delta: Tensor) -> tuple[Payload, ...]:
        """Return the kept values, scaled by 1/keep."""
        payload = self.unscaled(name, delta)
        return (replace(payload, scale=payload.scale / self.keep),)
