"""What the methods share that keep a seeded random selection and rescale it."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, Needs, check_choice, check_type
from dtrain.stages import Payload, Pipeline, decode, draw, encode

Mask = Literal["bernoulli", "stratified"]
Values = Literal["float16", "bfloat16", "uniform8", "uniform4", "uniform2", "sign"]
Search = Literal["grid", "golden"]
Scope = Literal["model", "layer"]


@dataclass(frozen=True)
class RandomDrop(Method):
    """Keep a random selection of the delta's elements.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the selection. It costs no bytes: it is drawn again from the seed and the tensor's name.
    """

    keep: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_type("keep", self.keep, float)
        check_type("seed", self.seed, int)
        _ = self.pipeline  # every stage checks its own parameters, now rather than after hours of training

    @property
    @abstractmethod
    def pipeline(self) -> Pipeline:
        """The stages of every payload."""

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: keep times the bits of a value."""
        quantise = self.pipeline.quantise
        return self.keep * quantise.bits * getattr(quantise, "symbols_per_value", 1)

    def unscaled(self, name: str, delta: Tensor, mask: Tensor | None = None) -> Payload:
        """Return the kept values without any rescaling (q = 1); `mask` is what is kept, where it is drawn already."""
        return encode(self.pipeline, name, delta, mask=mask)


@dataclass(frozen=True)
class Rescaled(RandomDrop):
    """Keep a random selection and divide it by a q between `keep` and 1 that can be searched.

    Args:
        keep: Share of the delta's elements that is kept, in [2**-24, 1].
        seed: Seed of the selection. It costs no bytes: it is drawn again from the seed and the tensor's name.
        q: A number in (0, 1]; "keep" for q = keep, as DARE does; "norm" to keep every tensor's Frobenius norm;
            "parallel" to keep the part of it that lies along the delta; "search" to fit it to the objective.
        scope: One q for the "model", or one for every "layer" (tensor), found after the model's.
        search: "grid": a logarithmic grid, refined once around its best point; "golden": golden-section search.
        masks: Number of masks the objective is averaged over while searching. The file holds the first one.
    """

    q: float | Literal["search", "norm", "parallel", "keep", "bound"] = "search"
    scope: Scope = "model"
    search: Search = "grid"
    masks: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_type("masks", self.masks, int)
        check_choice("scope", self.scope, ("model", "layer"))
        check_choice("search", self.search, ("grid", "golden"))
        if self.masks < 1:
            raise InputError(f"`masks` must be at least 1, got {self.masks}. Use masks=3 for a stable q.")
        self._check_q()

    @property
    def needs(self) -> Needs:
        """An objective where q is searched; nothing otherwise."""
        return "objective" if self.q == "search" else "nothing"

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the kept values, scaled by 1/q; where q is yet to be searched, they are not rescaled."""
        if self.q in ("norm", "parallel"):
            # Drawn once, for what is encoded and for what comes back of it.
            mask = draw(self.pipeline, name, delta.shape, delta.device)
            fit = with_norm_of if self.q == "norm" else along
            return (fit(delta, name, self.unscaled(name, delta, mask), mask),)
        payload = self.unscaled(name, delta)
        q = {"keep": self.keep}.get(self.q, 1.0) if isinstance(self.q, str) else self.q
        return (replace(payload, scale=payload.scale / q),)

    def _check_q(self) -> None:
        if isinstance(self.q, str):
            if self.q not in ("search", "norm", "parallel", "keep"):
                raise InputError(
                    f"`q` must be a number in (0, 1], 'search', 'norm', 'parallel' or 'keep', got {self.q!r}."
                )
            return
        check_type("q", self.q, float)
        if not 0 < self.q <= 1:
            raise InputError(f"`q` must be in (0, 1], got {self.q}. q=keep is DARE, q=1 is no rescaling.")


def with_norm_of(delta: Tensor, name: str, payload: Payload, mask: Tensor | None = None) -> Payload:
    """Return `payload` with the scale that gives what it decodes to the Frobenius norm of `delta`."""
    norm = _norm(decode(payload, name, delta.shape, delta.device, mask=mask).values) * payload.scale
    return replace(payload, scale=payload.scale * _norm(delta) / norm if norm else payload.scale)


def along(delta: Tensor, name: str, payload: Payload, mask: Tensor | None = None) -> Payload:
    """Return `payload` with the scale that makes the part of what it decodes to along `delta` the delta itself.

    That is <D, D> / <D, D_hat>: 1/keep of a random mask on the mean, and of signs more than that, since those of large
    elements count as much as those of small ones.
    """
    positions, values = decode(payload, name, delta.shape, delta.device, mask=mask)
    flat = delta.reshape(-1)
    found = _product(flat if positions is None else flat.index_select(0, positions), values) * payload.scale
    whole = _product(flat, flat)
    return replace(payload, scale=payload.scale * whole / found if found > 0 and whole else payload.scale)


def _norm(values: Tensor) -> float:
    return math.sqrt(_product(values, values))


def _product(left: Tensor, right: Tensor) -> float:
    # float64 sums differ between thread counts by far less than a float32 scale can show.
    wide = left.reshape(-1).double()
    return float(torch.dot(wide, wide if right is left else right.reshape(-1).double()))
