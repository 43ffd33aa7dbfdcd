"""What every method is: a frozen dataclass that turns one tensor's delta into payloads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, ClassVar, Literal, TypeVar, cast

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.stages import Payload

_Number = TypeVar("_Number", int, float)
Needs = Literal["nothing", "objective", "inputs", "covariance"]
#: Name of every tensor to compress, with a function that computes its delta (float32): all of them at once would take
#: as much memory as the model.
Deltas = Sequence[tuple[str, Callable[[], Tensor]]]
Encoder = Callable[[str, Tensor, Inputs | None], tuple[Payload, ...]]
#: Payloads of one tensor by the scale they share: one group for most methods, base vector and residual for `Dbms`.
Groups = tuple[tuple[Payload, ...], ...]


class Needing(ABC):
    """What can ask `compress` for data: a method, or a fit of its scales."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What `compress` has to be given."""

    @property
    def needs_calibration(self) -> bool:
        """Whether `compress` has to be given a calibration."""
        return self.needs in ("inputs", "covariance")

    @property
    def needs_covariance(self) -> bool:
        """Whether the calibration has to measure covariances."""
        return self.needs == "covariance"


class Method(Needing):
    """A way to compress a delta. Subclasses are frozen dataclasses whose docstring is their method card."""

    #: Where the method comes from.
    paper: ClassVar[str]
    #: Whether every tensor is stored bit for bit; then `encode` is not asked.
    bitwise: ClassVar[bool] = False

    @abstractmethod
    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Return the payloads of one tensor.

        Args:
            name: The tensor's name; random masks are keyed by it.
            delta: Fine-tuned minus base weights, float32, finite, of any shape.
            inputs: What the tensor is multiplied with, where the method needs it and the tensor is a layer's weight.
        """

    def plan(self, deltas: Deltas) -> Encoder:
        """Return what encodes one tensor after another; here, `encode`.

        A method whose choice for one tensor depends on the others looks at all of them first.
        """
        return self.encode

    @property
    def needs(self) -> Needs:
        """What `compress` has to be given.

        "nothing"; an "objective", to fit scales; a calibration, for each layer's "inputs" or for their "covariance".
        """
        return "nothing"

    @property
    def free(self) -> tuple[bool, ...]:
        """Which of the scales that a tensor's groups of payloads have a fit may change: the one that there is."""
        return (True,)

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: values only, positions and tables not counted."""

    def reseeded(self, by: int) -> Method:
        """Return the same method with other random masks, the `by`-th; itself where nothing is random."""
        seed: object = getattr(self, "seed", None)
        return replace(cast("Any", self), seed=(seed + by) % 2**64) if isinstance(seed, int) else self

    def at_share(self, share: float) -> Method:
        """Return a method like this one whose payloads take `share`, in (0, 1], of its bytes.

        Raises:
            InputError: If it has no rate that could be lowered.
        """
        keep: object = getattr(self, "keep", None)
        if isinstance(keep, float):
            return replace(cast("Any", self), keep=keep * share)
        raise InputError(
            f"the bytes of {type(self).__name__} cannot be split: it has no `keep` to lower. Give Dbms(split=None), "
            "where base vector and residual take as many bytes each as the host by itself, or another host."
        )

    def describe(self) -> dict[str, Any]:
        """Return the name and parameters, JSON-serialisable, as they stand in the file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return {"name": type(self).__name__, **{name: _plain(value) for name, value in values.items()}}


def check_type(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Refuse an argument that is no number of `kind`, before it costs hours of training.

    Raises:
        InputError: If `value` is a bool, a text, a numpy scalar or anything else that a file could not hold as it is.
    """
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or type(value) not in allowed:
        word = "a number" if kind is float else "an integer"
        raise InputError(f"`{name}` must be {word}, got {value!r}. Convert it with {kind.__name__}(...).")


def check_numbers(name: str, values: object, kind: type[_Number]) -> tuple[_Number, ...]:
    """Return a list or tuple of numbers of `kind` as a tuple.

    Raises:
        InputError: If it is anything else.
    """
    if not isinstance(values, (list, tuple)):
        raise InputError(f"`{name}` must be a list of numbers, got {values!r}. Use {name}=[...].")
    numbers = cast("Sequence[_Number]", values)
    for number in numbers:
        check_type(name, number, kind)
    return tuple(numbers)


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False: "no" would count as True.

    Raises:
        InputError: If it is.
    """
    if not isinstance(value, bool):
        raise InputError(f"`{name}` must be True or False, got {value!r}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a word that is none of `choices`.

    Raises:
        InputError: If it is not; the message lists them.
    """
    if value not in choices:
        raise InputError(f"`{name}` must be {' or '.join(map(repr, choices))}, got {value!r}.")


def check_keep(keep: float) -> None:
    """Refuse a share that is not in (0, 1].

    Raises:
        InputError: If it is not.
    """
    check_type("keep", keep, float)
    if not 0 < keep <= 1:
        raise InputError(f"`keep` must be in (0, 1], got {keep}. Use keep=0.01 to keep 1 % of the delta.")


def _plain(value: object) -> object:
    if isinstance(value, Method):
        return value.describe()
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
