"""A model under the names of its delta: those of the base, where the base's stand behind a prefix in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.difference import prefix_of
from dtrain.errors import InputError
from dtrain.weights import Weights


def named_as_delta(model: nn.Module, base: Weights, tuned: Weights) -> nn.Module:
    """Return `model` with the names that a delta from `base` to `tuned` has.

    Args:
        model: Built from `tuned`.
        base: The model before fine-tuning.
        tuned: The model after it. What it has beside the model's tensors must be as in the base: then it does not
            matter that the model makes no use of it.

    Raises:
        InputError: If the model goes by other names than `tuned`.
    """
    prefix, known = prefix_of(base, tuned), model.state_dict().keys()
    unused = {name.removeprefix(prefix): tensor for name, tensor in tuned.tensors.items() if name not in known}
    changed = [name for name, tensor in unused.items() if not _same(base.get(name), tensor)]
    if changed or not any(name.startswith(prefix) for name in known):
        raise InputError(
            f"{tuned.origin} holds {(changed or [prefix])[0]!r}, which {type(model).__name__} has under another name "
            f"or not at all ({len(changed)} such tensors): no fit can reach it. Compress in Python, with a module "
            "whose state dict has the names of the checkpoint."
        )
    return Renamed(model, prefix, unused)


class Renamed(nn.Module):
    """A model, some of whose parts are known without their prefix.

    Every tensor keeps one name, in the one table that the model itself looks it up in: what stands in for it here, as
    under `functional_call`, is what the model computes with.

    Args:
        model: The model. Its tables of direct tensors are changed: it is of no other use afterwards.
        prefix: What is taken off: the path of a part of the model with a dot behind it, or nothing.
        unused: Tensors that are to have a name, too.
    """

    def __init__(self, model: nn.Module, prefix: str, unused: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple it is no part of this module, and its names are none of this module's
        path = prefix.split(".")[:-1]
        inner = model.get_submodule(".".join(path))
        self._modules = (_Rest(model, path)._modules if path else {}) | inner._modules
        parameters = model._parameters | inner._parameters
        buffers = dict(unused) | model._buffers | inner._buffers
        passing = model._non_persistent_buffers_set | inner._non_persistent_buffers_set
        for part in (self, model, inner):
            part._parameters, part._buffers, part._non_persistent_buffers_set = parameters, buffers, passing
        self.eval()

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Run the model."""
        return self._model[0](*arguments, **named)


class _Rest(nn.Module):
    """A module without the part at `path`; it shares the tables of all others."""

    def __init__(self, module: nn.Module, path: Sequence[str]) -> None:
        super().__init__()
        self._parameters, self._buffers = module._parameters, module._buffers
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        self._modules = {name: part for name, part in module._modules.items() if name != path[0]}
        if path[1:]:
            self._modules[path[0]] = _Rest(module.get_submodule(path[0]), path[1:])


def _same(base: Tensor | None, tuned: Tensor) -> bool:
    return base is not None and base.dtype == tuned.dtype and torch.equal(base, tuned)
