"""DeltaDQ: group-wise dropout and separate quantisation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method, Needs, check_type
from dtrain.stages import Affine, All, Groups, Packed, Parts, Payload, Pipeline, encode, matrix_shape


@dataclass(frozen=True)
class DeltaDQ(Method):
    """Keep a fixed number of random elements of every group of neighbours, and quantise them in parts (DeltaDQ).

    Every row is split into groups of `group` inputs, group/alpha random elements of each are kept and multiplied by
    alpha; they are quantised uniformly and asymmetrically to `bits` bits, and their codes are stored in `parts` parts.

    * **Source**: Jiang et al., "DeltaDQ", arXiv 2410.08666, sections 3.2 and 3.3. Dropout, quantiser and parts are
      certain. The search looks at the attention scores of the first layers: which layers is a reading.
    * **Data needed**: none with a fixed group; group="search" needs a calibration.
    * **Bits per parameter**: nominal (bits - log2 parts) / alpha: 128x of 16 bits is alpha=8, bits=4, parts=8. On
      disk a code costs the entropy of its part as well: parts re-order the codes, they save nothing of themselves.
      Positions cost nothing, as they are a seed.
    * **When it fails**: one range per tensor is poor on heavy tails: on those of Student's t(3) four bits lose 0.6 of
      the energy of what is kept, two bits nearly all of it. With scope="row" four bits lose 0.07, with scope=128 0.03.

    Args:
        alpha: One element in alpha is kept: an integer, 1 to 65536.
        group: Neighbours in a group: "alpha" (one survivor each), "row", a multiple of alpha up to 65536, or "search"
            to take what changes the attention scores least.
        bits: Bits of a code, 1 to 16.
        parts: Parts the codes are stored in: a power of two, up to 2**bits; 1 stores the codes as they are.
        scope: What shares a range: the whole "tensor", a "row", or a number of neighbours.
        seed: Seed of the selection. It costs no bytes: it is drawn again from the seed and the tensor's name.

    Raises:
        InputError: If an argument is out of its range.
    """

    alpha: int = 8
    group: int | Literal["alpha", "row", "search"] = "alpha"
    bits: int = 4
    parts: int = 8
    scope: int | Literal["tensor", "row"] = "tensor"
    seed: int = 0
    paper: ClassVar[str] = "arXiv 2410.08666"

    def __post_init__(self) -> None:
        for name in ("alpha", "bits", "parts", "seed"):
            check_type(name, getattr(self, name), int)
        if not (1 <= self.alpha <= 1 << 16 and 1 <= self.bits <= 16 and 0 <= self.seed < 1 << 64):
            raise InputError(
                f"`alpha` must be in [1, 65536], `bits` in [1, 16], `seed` in [0, 2**64); got {self.alpha}, "
                f"{self.bits}, {self.seed}."
            )
        if self.group not in ("alpha", "row", "search") and (
            type(self.group) is not int or self.group % self.alpha or not 1 <= self.group <= 1 << 16
        ):
            raise InputError(
                f"`group` must be a multiple of alpha={self.alpha} up to 65536, got {self.group!r}. Use group='alpha'."
            )
        if self.scope not in ("tensor", "row") and (type(self.scope) is not int or not 2 <= self.scope < 1 << 32):
            raise InputError(f"`scope` must be 'tensor', 'row' or at least 2, got {self.scope!r}. Use scope=128.")
        if self.parts < 1 or self.parts & (self.parts - 1) or self.parts > min(256, 1 << self.bits):
            raise InputError(f"`parts` must be a power of two up to 2**bits and 256, got {self.parts}.")

    @property
    def needs(self) -> Needs:
        """The inputs of the attention layers where the group is searched; nothing otherwise."""
        return "inputs" if self.group == "search" else "nothing"

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: neither positions nor part identities counted."""
        return (self.bits - math.log2(self.parts)) / self.alpha

    def at_share(self, share: float) -> DeltaDQ:
        """Return the same method that keeps one element in `alpha / share`, rounded."""
        return replace(self, alpha=round(self.alpha / share))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the kept values, scaled by alpha."""
        if self.group == "search":
            raise InputError("DeltaDQ(group='search') has no group yet. Use dtrain.compress with a calibration.")
        columns = matrix_shape(delta.shape)[1]
        scope = {"tensor": 0, "row": columns}[self.scope] if isinstance(self.scope, str) else self.scope
        code = Parts(self.parts.bit_length() - 1) if self.parts > 1 else Packed()
        payload = encode(Pipeline(self._select(columns), Affine(self.bits, scope), code), name, delta)
        return (replace(payload, scale=payload.scale * self.alpha),)

    def _select(self, columns: int) -> All | Groups:
        if self.alpha == 1:
            return All()
        # A row that alpha does not divide is taken as the next longer one: the same share is kept, across rows.
        row = max(1, -(-columns // self.alpha)) * self.alpha
        size = self.group if isinstance(self.group, int) else {"row": row}.get(self.group, self.alpha)
        return Groups(size, size // self.alpha, self.seed)
