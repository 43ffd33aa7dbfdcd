"""Run somebody else's module on a batch and leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtrain.errors import InputError
from dtrain.weights import read_weights

_Result = TypeVar("_Result")


def tensors_of(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the tensors of `module` called `names`, by any name of tied ones; they share memory with it.

    Raises:
        InputError: If it lacks one.
    """
    weights = read_weights(module)
    found = {name: weights.get(name) for name in names}
    missing = [name for name, tensor in found.items() if tensor is None]
    if missing:
        raise InputError(
            f"the module of the objective or calibration has no tensor {missing[0]!r} ({len(missing)} names of the "
            "delta are missing). Give it the module whose state dict has the delta's names."
        )
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def run(module: nn.Module, forward: Callable[[nn.Module, Any], object], batch: Any, *, grad: bool = False) -> object:
    """Return what `forward` makes of `module` and `batch`, in evaluation mode.

    Compiled code runs eagerly: it does not pass through Python, where hooks and watchers are.

    Args:
        module: The model.
        forward: Runs it.
        batch: What it is run on.
        grad: Whether the result is to have gradients.

    Raises:
        InputError: If the module cannot be called on the batch.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.set_grad_enabled(grad), torch.compiler.set_stance("force_eager"):
            return forward(module, batch)
    except TypeError as error:
        raise InputError(
            f"the model cannot be called on a batch of type {type(batch).__name__} ({error}). Pass forward=, "
            "a function of the model and the batch; batches of (inputs, labels) need one."
        ) from error
    finally:
        for part, training in modes.items():
            part.training = training


def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor], work: Callable[[], _Result]) -> _Result:
    """Return what `work` returns while `tensors` stand in for the module's own of these names, and for those tied.

    The module's other parameters take part without gradients.
    """
    # One name per place that holds a tensor: of a module that is registered twice, functional_call would put the
    # stand-in back for good.
    slots: dict[str, Tensor] = {}
    for prefix, part in cast("Iterable[tuple[str, nn.Module]]", module.named_modules()):
        for leaf, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            slots[f"{prefix}.{leaf}".removeprefix(".")] = value
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    if missing := sorted(set(tensors) - {_clean(name) for name, _ in named}):
        raise InputError(
            f"the module's parameters have another name for {missing[0]!r} than its state dict, so its scale cannot be "
            "learnt. Use dtrain.Search."
        )
    stand_in = {id(value): tensors[clean] for name, value in named if (clean := _clean(name)) in tensors}
    given = {f"module.{name}": stand_in.get(id(value), value.detach()) for name, value in slots.items()}
    return functional_call(_Stage(module, work), given, (), tie_weights=False)


def _clean(name: str) -> str:
    """Return a name as it was before `torch.compile`."""
    return name.replace("_orig_mod.", "")


class _Stage(nn.Module):
    """A module around another, so that `functional_call` can run anything that calls the inner one."""

    def __init__(self, module: nn.Module, work: Callable[[], Any]) -> None:
        super().__init__()
        self.module, self._work = module, work

    def forward(self) -> Any:
        """Do the work."""
        return self._work()


def call(module: nn.Module, batch: Any) -> object:
    """Run `module` on a batch: a mapping by keyword, a sequence by position, anything else as the only argument."""
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    moved = _to(batch, device)
    if isinstance(moved, Mapping):
        return module(**cast("Mapping[str, Any]", moved))
    if isinstance(moved, Sequence) and not isinstance(moved, str):
        return module(*cast("Sequence[Any]", moved))
    return module(moved)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_to(item, device) for item in cast("Sequence[Any]", value)]
    return value
