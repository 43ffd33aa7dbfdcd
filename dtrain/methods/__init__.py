"""Methods: one file per paper, each a frozen dataclass whose docstring is its method card."""

from dtrain.methods.dare import Dare
from dtrain.methods.darex import DareX
from dtrain.methods.lossless import Lossless
from dtrain.methods.method import Method

#: Every method, in the order in which `dtrain methods` and the README list them.
METHODS: tuple[type[Method], ...] = (Dare, DareX, Lossless)

__all__ = ["METHODS", "Dare", "DareX", "Lossless", "Method"]
