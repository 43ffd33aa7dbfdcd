"""Try scales on a live module: write candidate weights, look, restore."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dtrain.errors import InputError
from dtrain.fit.running import tensors_of
from dtrain.runtime import add, write
from dtrain.stages import Decoded
from dtrain.weights import tensor_bytes


class Trial:
    """A context that owns the weights of a module and puts back on exit what it found.

    Args:
        module: Its tensors are written to.
        tuned: The tensors that will be written to, with the fine-tuned weights of these names.

    Raises:
        InputError: If the module lacks one of them.
    """

    def __init__(self, module: nn.Module, tuned: Mapping[str, Tensor]) -> None:
        self._tensors, self._tuned = tensors_of(module, tuned), tuned
        self._found: dict[str, Tensor] = {}

    def __enter__(self) -> Trial:
        # Where the module holds the fine-tuned weights, as it mostly does, they need not be copied to be put back.
        self._found = {
            name: self._tuned[name] if _is_copy(self._tuned[name], tensor) else tensor.clone()
            for name, tensor in self._tensors.items()
        }
        return self

    def __exit__(self, *_: object) -> None:
        self.write(self._found)

    def tensor(self, name: str) -> Tensor:
        """Return the module's tensor called `name`, which shares its memory."""
        return self._tensors[name]

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
    def put(self, name: str, base: Tensor, decoded: Sequence[Decoded], scales: Sequence[float]) -> None:
        """Put W0 + sum of scale * decoded in place, by the very arithmetic that `Delta.apply_` uses."""
        tensor = self._tensors[name]
        write(tensor, add(base.to(tensor.device), decoded, scales, self._tuned[name].dtype))


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors lie in the same storage."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_copy(a: Tensor, b: Tensor) -> bool:
    """Return whether `a` holds the same bits as `b`, in memory of its own."""
    same = (a.dtype, a.shape) == (b.dtype, b.shape) and not share_memory(a, b)
    return same and torch.equal(tensor_bytes(a), tensor_bytes(b))
