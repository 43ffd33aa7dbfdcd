"""DBMS: shift the base before the delta to it is compressed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from dtrain.errors import InputError, NeedsDataError
from dtrain.methods.drop import Rescaled
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Deltas, Encoder, Groups, Method, Needs, check_choice, check_type
from dtrain.methods.seeded_sign import SeededSign
from dtrain.stages import SHARED, Payload, rebuild
from dtrain.stages.quantise import float32

SPLITS = (0.25, 0.5, 0.75)  # that split="search" tries
_OTHER_SEED = 1 << 63  # far from every seed that masks are averaged over


@dataclass(frozen=True)
class Dbms(Method):
    """Add a compressed base vector to the base, and compress the delta to that shifted base (DBMS).

    `W_hat = W0 + lam * b + eta * C(r)` with `b = C_b(v)` and `r = W1 - (W0 + lam * b)`: two payloads and two learned
    scalars, the magnitude `lam` of the shift and the scale `eta` of the rest. The codes of r follow lam while it moves.

    * **Source**: Huang et al., "Dynamic Base model Shift for Delta Compression", arXiv 2505.11344, abstract: a
      compressed base vector is fused into the base, two parameters per task are learnt at low cost, any method can
      compress the rest. *Readings*: what v is (source), the objective, and how lam and eta are found. The byte split is
      ours.
    * **Data needed**: training inputs, unless both `lam` and `eta` are numbers; and what the host needs.
    * **Bits per parameter**: the host's: with source="own" its rate is split between the two payloads; with
      source="shared" the base vector is in a file of its own, paid for once by the whole family.
    * **When it fails**: with source="own" on a random mask it is a second draw at half the rate: what is won by taking
      the first draw out of the second is little. A shared vector helps where the tasks of a family move alike.

    Args:
        host: How base vector and residual are compressed, at the bytes of both together. Where it searches a scale, eta
            takes its place.
        source: What v is: this task's "own" delta, or one "shared" by a family, which `dtrain.shared_base` makes.
        split: With source="own": share of the bytes that the base vector gets, in (0, 1); "search" to try a quarter, a
            half and three quarters; None to give both all of the host's bytes.
        lam: Magnitude of the shift, 0 or more; "fit" to learn it. 1 shifts by b as it is decoded; with a random mask
            that is without rescaling.
        eta: Scale of the compressed residual, 0 or more; "fit" to learn it.

    Raises:
        InputError: If an argument is out of its range.
    """

    host: Method = field(default_factory=SeededSign)
    source: Literal["own", "shared"] = "own"
    split: float | Literal["search"] | None = 0.5
    lam: float | Literal["fit"] = "fit"
    eta: float | Literal["fit"] = "fit"
    # The card's source is the paper; the field of this name is what the paper leaves open.
    paper: ClassVar[str] = "arXiv 2505.11344"

    def __post_init__(self) -> None:
        check_choice("source", self.source, ("own", "shared"))
        if not isinstance(self.host, Method) or isinstance(self.host, Dbms) or self.host.bitwise:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InputError(f"`host` must be a lossy method such as dtrain.SeededSign(), got {self.host!r}.")
        for name in ("lam", "eta"):
            value = getattr(self, name)
            if value != "fit":
                check_type(name, value, float)
                if not 0 <= value < 1e6:
                    raise InputError(f"`{name}` must be 'fit' or a number from 0 on, got {value!r}.")
        if self.split is not None and self.split != "search":
            check_type("split", self.split, float)
            if not 0 < self.split < 1:
                raise InputError(f"`split` must be in (0, 1), 'search' or None, got {self.split}.")
        if self.source == "own" and self.split is not None:
            _ = self.hosts  # a host that has no rate is refused now

    @property
    def hosts(self) -> tuple[Method, Method]:
        """The methods that compress base vector and residual, with fixed scales and independent masks."""
        host = _with_fixed_scale(self.host)
        share = 0.5 if self.split == "search" else self.split
        first, second = (host, host) if share is None else (host.at_share(share), host.at_share(1 - share))
        return as_base_vector(first), host if self.source == "shared" else second

    @property
    def free(self) -> tuple[bool, ...]:
        """Whether lam and eta are to be fitted."""
        return self.lam == "fit", self.eta == "fit"

    @property
    def searches_split(self) -> bool:
        """Whether the byte split is left to an objective."""
        return self.source == "own" and self.split == "search"

    @property
    def needs(self) -> Needs:
        """An objective where a scalar is learnt or the split searched; else what the host needs."""
        return "objective" if any(self.free) or self.searches_split else _with_fixed_scale(self.host).needs

    @property
    def needs_calibration(self) -> bool:
        """Whether the host looks at the inputs of layers."""
        return _with_fixed_scale(self.host).needs_calibration

    @property
    def needs_covariance(self) -> bool:
        """Whether the host looks at the covariance of the inputs of layers."""
        return _with_fixed_scale(self.host).needs_covariance

    @property
    def nominal_bits(self) -> float:
        """Bits per parameter of both payloads, by the host's own accounting."""
        first, second = self.hosts
        return second.nominal_bits + (first.nominal_bits if self.source == "own" else 0.0)

    def reseeded(self, by: int) -> Method:
        """Return the same method on a host with other random masks."""
        return replace(self, host=self.host.reseeded(by))

    def plan(self, deltas: Deltas) -> Encoder:
        """Let the host look at all deltas, where it wants to."""
        return self.encoder(deltas)

    def encoder(self, deltas: Deltas, shared: Mapping[str, tuple[Payload, ...]] | None = None) -> Shifted:
        """Return what encodes one tensor after another.

        Args:
            deltas: All tensors to compress.
            shared: The payloads of the family's base vector by tensor name, for source="shared".

        Raises:
            NeedsDataError: If source="shared" and there are none.
        """
        if self.source == "shared" and shared is None:
            raise NeedsDataError(
                "Dbms(source='shared') got no base vector. Make one with dtrain.shared_base(base, finetunes, method), "
                "save it, and pass shared= (on the command line --shared FILE)."
            )
        lam, eta = (1.0 if value == "fit" else value for value in (self.lam, self.eta))
        first, second = self.hosts
        shifted = Shifted(first.plan(deltas), second.encode, lam, eta, shared if self.source == "shared" else None)
        # What a host settles by looking at everything, it settles for the residuals to the shift that is begun with.
        return shifted.followed_by(second.plan([(name, partial(shifted.rest, name, get)) for name, get in deltas]))

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the payloads of base vector and residual, with lam = 1 and eta = 1 where they are yet to be fitted."""
        return self.plan([(name, lambda: delta)])(name, delta, inputs)


class Shifted:
    """Encodes a tensor as base vector and residual.

    Args:
        base: Encodes the base vector.
        residual: Encodes the residual.
        lam: Magnitude of the shift to begin with.
        eta: Scale of the residual to begin with.
        shared: Payloads of a shared base vector by tensor name; None to encode the tensor's own.
    """

    def __init__(
        self,
        base: Encoder,
        residual: Encoder,
        lam: float,
        eta: float,
        shared: Mapping[str, tuple[Payload, ...]] | None = None,
    ) -> None:
        self._base, self._residual, self._shared = base, residual, shared
        self._lam, self._eta = float32(lam), float32(eta)

    def followed_by(self, residual: Encoder) -> Shifted:
        """Return the same with another encoder of the residual."""
        return Shifted(self._base, residual, self._lam, self._eta, self._shared)

    def rest(self, name: str, get: Callable[[], Tensor]) -> Tensor:
        """Return what the shift that is begun with leaves of a delta."""
        return _rest(name, delta := get(), self._vector(name, delta, None))

    def __call__(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return all payloads of one tensor."""
        base, residual = self.groups(name, delta, inputs)
        return (*self.stored(base), *residual)

    def groups(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> Groups:
        """Return the payloads of base vector and residual."""
        base = self._vector(name, delta, inputs)
        return base, self.residual(name, delta, base, inputs)

    def residual(
        self, name: str, delta: Tensor, base: tuple[Payload, ...], inputs: Inputs | None = None
    ) -> tuple[Payload, ...]:
        """Return the payloads of what a base vector, as it is scaled now, leaves of the delta."""
        return scaled(self._residual(name, _rest(name, delta, base), inputs), self._eta)

    def stored(self, base: tuple[Payload, ...], factor: float = 1.0) -> tuple[Payload, ...]:
        """Return what the file holds of a base vector whose payloads are scaled by `factor`: of a shared one, lam."""
        if self._shared is None or not base:
            return scaled(base, factor)
        return (Payload(SHARED, torch.empty(0, dtype=torch.uint8), self._lam * factor),)

    def _vector(self, name: str, delta: Tensor, inputs: Inputs | None) -> tuple[Payload, ...]:
        own = self._base(name, delta, inputs) if self._shared is None else self._shared.get(name, ())
        return scaled(own, self._lam)


def _rest(name: str, delta: Tensor, base: tuple[Payload, ...]) -> Tensor:
    return (delta.cpu().double() - rebuild(base, name, delta.shape)).float().to(delta.device)


def as_base_vector(method: Method) -> Method:
    """Return the method as it compresses a base vector: with scales that lam stands in for, and masks of its own."""
    method = _with_fixed_scale(method)
    if isinstance(method, Rescaled):
        # What is kept is kept as it is: unbiased by 1/keep, it would leave a residual larger than the delta.
        method = replace(method, q=1.0)
    return method.reseeded(_OTHER_SEED)


def scaled(payloads: tuple[Payload, ...], factor: float) -> tuple[Payload, ...]:
    """Return the payloads with their scales multiplied by `factor`."""
    return tuple(replace(payload, scale=payload.scale * factor) for payload in payloads)


def _with_fixed_scale(host: Method) -> Method:
    """Return the host with q = keep where it would search q: eta is that scale."""
    return cast("Any", replace(host, q="keep")) if isinstance(host, Rescaled) and host.q == "search" else host
