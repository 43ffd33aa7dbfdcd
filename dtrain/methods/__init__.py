"""Methods: one file per paper, each a frozen dataclass whose docstring is its method card."""

from dtrain.methods.bitdelta import BitDelta
from dtrain.methods.compeft import ComPEFT
from dtrain.methods.dare import Dare
from dtrain.methods.darex import DareX
from dtrain.methods.dbms import Dbms, Shifted
from dtrain.methods.deltacome import DeltaCoMe
from dtrain.methods.deltadct import DeltaDCT
from dtrain.methods.deltadq import DeltaDQ
from dtrain.methods.drop import Rescaled
from dtrain.methods.ecsq import Ecsq
from dtrain.methods.eora import EoRA
from dtrain.methods.impart import ImPart
from dtrain.methods.inputs import Inputs
from dtrain.methods.lossless import Lossless
from dtrain.methods.magnitude import Magnitude
from dtrain.methods.method import Method
from dtrain.methods.seeded_sign import SeededSign
from dtrain.methods.structured import Structured
from dtrain.methods.ultradelta import UltraDelta
from dtrain.methods.wanda import Wanda

#: Every method, in the order in which `dtrain methods` and the README list them.
METHODS: tuple[type[Method], ...] = (
    Dare,
    DareX,
    Structured,
    Magnitude,
    Wanda,
    DeltaDQ,
    DeltaDCT,
    BitDelta,
    ComPEFT,
    DeltaCoMe,
    ImPart,
    UltraDelta,
    EoRA,
    Ecsq,
    SeededSign,
    Dbms,
    Lossless,
)

__all__ = [
    "METHODS",
    "BitDelta",
    "ComPEFT",
    "Dare",
    "DareX",
    "Dbms",
    "DeltaCoMe",
    "DeltaDCT",
    "DeltaDQ",
    "Ecsq",
    "EoRA",
    "ImPart",
    "Inputs",
    "Lossless",
    "Magnitude",
    "Method",
    "Rescaled",
    "SeededSign",
    "Shifted",
    "Structured",
    "UltraDelta",
    "Wanda",
]
