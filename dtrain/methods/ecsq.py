"""Ecsq: an entropy-coded scalar quantiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Deltas, Encoder, Method, check_type
from dtrain.stages import All, DeadZone, Payload, Pipeline, Rans, encode

_ZONES = (0.5, 0.6, 0.75, 1.0, 1.25)  # half widths of the zero bin to choose among; the best one grows as rates fall
_SAMPLE = 1 << 21  # elements of all tensors together that the choice looks at: so bits are met to 1 % from 1/16 on
_HALVINGS = 24
_TOP = 127


class Choice(NamedTuple):
    """A step (in units of the delta) and half the width of the zero bin (in steps)."""

    step: float
    zone: float


@dataclass(frozen=True)
class Ecsq(Method):
    """Spend bits where they save most squared error: a dead-zone quantiser with one step, and an entropy coder (ours).

    `c = sign(D) * floor(|D| / step + 1 - zone)`; each level is decoded to the mean of what it holds; the symbols are
    coded by rANS. One step for the whole model means equal slopes: no tensor could use a bit better than another.

    * **Source**: textbook (Sullivan 1996; Gray and Neuhoff 1998); applied to deltas by us. Step and zone are chosen to
      meet `bits` at the least squared error.
    * **Data needed**: none.
    * **Bits per parameter**: nominal `bits`, the entropy of the symbols; on disk the same and a table per tensor. There
      are 127 levels each way: what these cannot use is not spent, beyond 6 bits on Gaussian deltas and beyond 4 on
      heavier tails.
    * **When it fails**: below about 0.4 bit per parameter what survives is biased towards few large weights, and
      accuracy falls far below that of a random mask of the same bytes. Use it from half a bit on, where it is the best
      in squared error.

    Args:
        bits: Bits per parameter to spend, in (0, 8].

    Raises:
        InputError: If `bits` is out of its range.
    """

    bits: float = 1.0
    paper: ClassVar[str] = "ours (textbook)"

    def __post_init__(self) -> None:
        check_type("bits", self.bits, float)
        if not 0 < self.bits <= 8:
            raise InputError(f"`bits` must be in (0, 8], got {self.bits}. Use bits=1.")

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter: the entropy of the symbols."""
        return float(self.bits)

    def plan(self, deltas: Deltas) -> Encoder:
        """Choose one step and zone for all tensors from an even sample of their elements."""
        stride = _stride(sum(get().numel() for _, get in deltas))
        return partial(self._encode, self._choose([get().reshape(-1)[::stride].cpu() for _, get in deltas]))

    def at_share(self, share: float) -> Ecsq:
        """Return the same method with `share` of the bits."""
        return replace(self, bits=self.bits * share)

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the coded symbols of one tensor with a step of its own."""
        return self._encode(self._choose([delta.reshape(-1)[:: _stride(delta.numel())].cpu()]), name, delta)

    def _encode(self, choice: Choice, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        top = float(delta.abs().max()) / choice.step if delta.numel() else 0.0
        quantise = DeadZone(choice.zone, min(_TOP, max(1, math.floor(top + 1 - choice.zone))))
        payload = encode(Pipeline(All(), quantise, Rans()), name, delta / choice.step)
        return (replace(payload, scale=payload.scale * choice.step),)

    def _choose(self, samples: Sequence[Tensor]) -> Choice:
        """Return the step and zone that code the samples in `bits` bits per element at the least squared error.

        Every tensor has a table of symbols of its own, so entropies are taken per tensor.
        """
        sizes = [sample.abs().sort().values for sample in samples if sample.numel()]
        largest = max((float(size[-1]) for size in sizes), default=0.0)
        if not largest:
            return Choice(1.0, 0.5)
        choices = [self._meet(sizes, zone, largest) for zone in _ZONES]
        return min(choices, key=lambda choice: sum(_error(size, choice) for size in sizes))

    def _meet(self, sizes: Sequence[Tensor], zone: float, largest: float) -> Choice:
        """Return the step at which the entropy is `bits`: it falls as the step grows."""
        low, high = math.log(largest / _TOP), math.log(largest / zone) + 1e-3
        wanted = self.bits * sum(size.numel() for size in sizes)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if sum(_entropy(_counts(size, Choice(math.exp(middle), zone))) for size in sizes) > wanted:
                low = middle
            else:
                high = middle
        return Choice(math.exp(high), zone)


def _stride(total: int) -> int:
    """Return the distance of sampled elements: odd, for an even one might see a few columns of a matrix only."""
    return total // _SAMPLE | 1


def _counts(size: Tensor, choice: Choice) -> Tensor:
    """Return how many of the ascending magnitudes `size` fall on each level, 0 first."""
    levels = torch.arange(_TOP, dtype=size.dtype)
    edges = torch.searchsorted(size, (levels + choice.zone) * choice.step)
    return torch.diff(edges, prepend=torch.tensor([0]), append=torch.tensor([size.numel()]))


def _entropy(counts: Tensor) -> float:
    """Return the bits of all elements; one above level 0 has a sign as well."""
    used = counts[counts > 0].double()
    total = used.sum()
    return float(counts[1:].sum() - (used * (used / total).log2()).sum())


def _error(size: Tensor, choice: Choice) -> float:
    """Return the squared error left when every level is decoded to its mean (0 for level 0)."""
    counts = _counts(size, choice)
    level = torch.arange(len(counts)).repeat_interleave(counts)
    sums = torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, level, size.double())
    explained = sums.square()[1:] / counts[1:].clamp_min(1)
    return float(size.double().square().sum() - explained.sum())
