"""Record how validation calls the model on training inputs, and call it so again: without Trainer, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dtrain.callbacks.evaluation import validate
from dtrain.callbacks.undisturbed import same_numbers

#: The arguments of one call: by keyword where there are no others, so that an objective finds `attention_mask`.
Arguments = dict[str, Any] | tuple[tuple[Any, ...], dict[str, Any]]


class Replay(NamedTuple):
    """The calls that one part of a module gets in validation.

    Args:
        calls: The arguments of each, one batch of an objective.
        forward: Calls the part with such arguments, in the precision of the run and with the same random numbers.
    """

    calls: list[Arguments]
    forward: Callable[[nn.Module, Any], object]


def record(
    trainer: pl.Trainer, pl_module: pl.LightningModule, target: nn.Module, loader: Any, batches: int
) -> Replay | None:
    """Run the module's own validation step on training batches, and return what it calls of `target`.

    Whether that is `target` itself or a part of it is up to the step: a LightningModule is often not called at all.

    Args:
        trainer: The trainer of the run.
        pl_module: The module.
        target: The part of it that the delta belongs to.
        loader: Gives the batches.
        batches: How many to run.

    Returns:
        The calls, or None where there is none, or where several parts are called one after the other: what the second
        gets hangs on the first, so they cannot be called again by themselves.
    """
    with _Recorder(target) as recorder, torch.compiler.set_stance("force_eager"):
        validate(trainer, pl_module, instead=loader, batches=batches)
    parts = {id(part): part for part, _ in recorder.calls}
    if len(parts) != 1:
        return None
    (part,) = parts.values()

    def forward(_: nn.Module, call: Arguments) -> object:
        with same_numbers(), trainer.precision_plugin.val_step_context():
            return part(**call) if isinstance(call, Mapping) else part(*call[0], **call[1])

    return Replay([call for _, call in recorder.calls], forward)


class _Recorder:
    """A context that notes how the parts of a module are called by what is no part of it.

    Only parts with something to train count: metrics, losses and frozen teachers are modules as well.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts = [part for part in module.modules() if any(param.requires_grad for param in part.parameters())]
        self._hooks: list[Any] = []
        self._depth = 0  # how many parts are running, each within the other
        self.calls: list[tuple[nn.Module, Arguments]] = []

    def __enter__(self) -> _Recorder:
        for part in self._parts:
            self._hooks.append(part.register_forward_pre_hook(self._enter, with_kwargs=True))
            self._hooks.append(part.register_forward_hook(self._leave, always_call=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, part: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not self._depth:
            call = (arguments, named) if arguments else named
            # Validation runs in inference mode, whose tensors can have no part in a gradient.
            with torch.inference_mode(False), torch.no_grad():
                self.calls.append((part, _copied(call)))
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1


def _copied(value: Any) -> Any:
    """Return the arguments of a call with copies of their tensors."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in cast("dict[Any, Any]", value).items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(item) for item in value)
    return value
