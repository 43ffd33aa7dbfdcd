"""What every method is: a frozen dataclass that turns one tensor's delta into payloads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages import Payload


class Method(ABC):
    """A way to compress a delta. Subclasses are frozen dataclasses whose docstring is their method card."""

    #: Where the method comes from.
    source: ClassVar[str]
    #: Whether every tensor is stored bit for bit; then `encode` is not asked.
    bitwise: ClassVar[bool] = False

    @abstractmethod
    def encode(self, name: str, delta: Tensor) -> tuple[Payload, ...]:
        """Return the payloads of one tensor.

        Args:
            name: The tensor's name; random masks are keyed by it.
            delta: Fine-tuned minus base weights, float32, finite, of any shape.
        """

    @property
    def needs(self) -> str:
        """What the method must be fitted on: "nothing", or "objective" where `compress` has to be given one."""
        return "nothing"

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per parameter by the paper's own accounting: values only, positions and tables not counted."""

    def describe(self) -> dict[str, Any]:
        """Return the name and parameters, JSON-serialisable, as they stand in the file."""
        return {"name": type(self).__name__, **asdict(self)}  # type: ignore[call-overload]


def check_type(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Refuse an argument that is no number of `kind`, before it costs hours of training.

    Raises:
        InputError: If `value` is a bool, a text, a numpy scalar or anything else that a file could not hold as it is.
    """
    allowed = (int, float) if kind is float else (int,)
    if isinstance(value, bool) or type(value) not in allowed:
        word = "a number" if kind is float else "an integer"
        raise InputError(f"`{name}` must be {word}, got {value!r}. Convert it with {kind.__name__}(...).")
