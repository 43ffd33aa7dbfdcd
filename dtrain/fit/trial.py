"""Try scales on a live module: write candidate weights, look, restore."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtrain.errors import InputError
from dtrain.fit.running import tensors_of
from dtrain.runtime import add, write
from dtrain.stages import Decoded, Payload, decode


class Candidate(NamedTuple):
    """One tensor whose scales are to be fitted."""

    base: Tensor
    decoded: tuple[Decoded, ...]
    scales: tuple[float, ...]
    dtype: torch.dtype


def candidate(
    name: str, base: Tensor, payloads: Sequence[Payload], dtype: torch.dtype, device: torch.device
) -> Candidate:
    """Return the candidate of one tensor, decoded onto `device`."""
    decoded = tuple(decode(payload, name, base.shape, device) for payload in payloads)
    return Candidate(base.to(device), decoded, tuple(payload.scale for payload in payloads), dtype)


class Trial:
    """A context that owns the weights of a module and puts back on exit what it found.

    Args:
        module: Its tensors are written to.
        names: The tensors that will be written to.

    Raises:
        InputError: If the module lacks one of them.
    """

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        self._tensors = tensors_of(module, names)
        self._found: dict[str, Tensor] = {}

    def __enter__(self) -> Trial:
        self._found = {name: tensor.clone() for name, tensor in self._tensors.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self.write(self._found)

    def device(self, name: str) -> torch.device:
        """Return the device of the module's tensor called `name`."""
        return self._tensors[name].device

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Put whole tensors in place."""
        for name, value in values.items():
            if self._tensors[name].shape != value.shape:
                raise InputError(
                    f"tensor {name!r} is {tuple(self._tensors[name].shape)} in the module of the objective "
                    f"or calibration and {tuple(value.shape)} in the delta. Give it the fine-tuned model."
                )
            self._tensors[name].copy_(value)

    @torch.no_grad()
    def rescale(self, candidates: Mapping[str, Candidate], factors: Mapping[str, float]) -> None:
        """Put W0 + factor * scale * decoded in place, by the very arithmetic that `Delta.apply_` uses."""
        for name, item in candidates.items():
            scales = [factors[name] * scale for scale in item.scales]
            write(self._tensors[name], add(item.base, item.decoded, scales, item.dtype))
