"""Bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from dtrain.errors import InputError
from dtrain.methods.inputs import Inputs
from dtrain.methods.method import Method
from dtrain.stages import Payload


@dataclass(frozen=True)
class Lossless(Method):
    """Store every changed tensor bit for bit: its bits xor the base's, in byte planes, coded by Zstandard.

    Fine-tuning moves few exponents, so the high bytes of the xor are mostly zero.

    * **Source**: the xor of two fine-tunes is folklore (BitX in "ZipLLM", arXiv 2505.06252; ZipNN, arXiv 2411.05239);
      byte planes of it under Zstandard are our reading.
    * **Data needed**: none. Any dtype; NaN payloads, infinities and negative zeros survive.
    * **Bits per parameter**: no nominal figure; for changes of 1e-4 to 3e-3 to weights of 0.03 it is 20 to 25 of 32 on
      float32 and 4 to 9 of 16 on bfloat16.
    * **When it fails**: never wrong, rarely small.
    """

    paper: ClassVar[str] = "arXiv 2505.06252 (reading)"
    bitwise: ClassVar[bool] = True

    @property
    def nominal_bits(self) -> float:
        """The bits of the checkpoint's own dtype: no saving is claimed before the file is written."""
        return float("nan")

    def encode(self, name: str, delta: Tensor, inputs: Inputs | None = None) -> tuple[Payload, ...]:
        """Refuse: bitwise tensors have no float delta."""
        raise InputError(f"Lossless stores the bits of {name!r}, not a delta. Use dtrain.compress.")
