"""What BASE and FINETUNED name: a model, a PEFT adapter, or a base that is zero everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from dtrain.cli.parser import ZEROS, UsageError
from dtrain.lora import lora_factors, lora_product
from dtrain.weights import Source, is_adapter, read_weights


class Pair(NamedTuple):
    """What `compress` is to compare, and what it takes of an adapter where FINETUNED is one."""

    base: Source | None
    finetuned: Source
    adapter: Literal["product", "factors"] | None = None

    def note(self, finetuned: str, out: str) -> list[str]:
        """Return the line that says so."""
        return {
            "product": [f"{finetuned} is an adapter: compressed is what it adds to the base, scaling * B A"],
            "factors": [f"compressed are the factors of {finetuned}; for PEFT: dtrain apply {ZEROS} {out} FOLDER"],
            None: [],
        }[self.adapter]


def open_pair(base: str, finetuned: str) -> Pair:
    """Return the two models that `base` and `finetuned` name.

    Raises:
        UsageError: If `base` is zeros, but `finetuned` no adapter.
        InputError: If the adapter cannot be read, or is not of this base.
    """
    if is_zeros(base):
        if not is_adapter(finetuned):
            raise UsageError(f"BASE {ZEROS} goes with the folder of a PEFT adapter, which {finetuned} is not.")
        return Pair(None, lora_factors(finetuned), "factors")
    if is_adapter(finetuned):
        weights = read_weights(base)
        return Pair(weights, lora_product(weights, finetuned), "product")
    return Pair(base, finetuned)


def is_zeros(base: str) -> bool:
    """Return whether `base` names no file or folder, but the base that is zero everywhere."""
    return base == ZEROS and not Path(base).exists()
