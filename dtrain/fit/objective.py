"""Objectives: what a fit looks at. They see training inputs only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from dtrain.errors import InputError
from dtrain.fit.running import call, run


@runtime_checkable
class Objective(Protocol):
    """A number to be made small by choosing scales.

    The fit writes candidate weights into the tensors of `module` and asks for `loss`. It calls `remember` once before,
    while the fine-tuned weights are in place.
    """

    module: nn.Module
    label: str

    def remember(self) -> None:
        """Called with the fine-tuned weights in place: keep what candidates are to be compared with."""

    def loss(self) -> float:
        """Return the loss of the weights now in place; lower is better."""
        ...


class Metric:
    """A task metric on labelled training inputs (q_v of DAREx).

    Args:
        module: The model; its tensor names are the delta's.
        evaluate: Returns the metric of the model it is given, on held-out *training* data, never on evaluation data.
        mode: "max" where more is better, "min" where less is.
    """

    def __init__(
        self, module: nn.Module, evaluate: Callable[[nn.Module], float], mode: Literal["max", "min"] = "max"
    ) -> None:
        if mode not in ("max", "min"):
            raise InputError(f"`mode` must be 'max' or 'min', got {mode!r}.")
        self.module, self._evaluate, self._sign = module, evaluate, -1.0 if mode == "max" else 1.0
        self.label = "metric"

    def remember(self) -> None:
        """Do nothing: labels say what is right."""

    def loss(self) -> float:
        """Return the metric, negated where more is better."""
        return self._sign * float(self._evaluate(self.module))


class HiddenChange:
    """Mean absolute change of the last hidden state, on unlabelled inputs (q_e of DAREx, for encoders).

    The last hidden state is taken to be the input of the linear layer that runs last (a reading that holds for any
    module with a head); where no linear layer runs, the model's output.

    Args:
        module: The model; its tensor names are the delta's.
        batches: Training inputs without augmentation. A mapping is passed by keyword, a sequence by position, anything
            else as the only argument.
        forward: Runs the model on one batch, where calling the module on it is not right.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        self.module, self._batches, self._forward = module, list(batches), forward or call
        if not self._batches:
            raise InputError("`batches` is empty. Give at least one batch of training inputs.")
        self._target: list[Tensor] = []
        self.label = "hidden change"

    def remember(self) -> None:
        """Cache the hidden states of the fine-tuned model."""
        self._target = [self._hidden(batch) for batch in self._batches]

    def loss(self) -> float:
        """Return the mean of |h_finetuned - h| over all batches."""
        if not self._target:
            raise InputError(
                "HiddenChange has nothing to compare with. Call remember() with the fine-tuned weights first."
            )
        return mean_change((self._hidden(batch) for batch in self._batches), self._target)

    def _hidden(self, batch: Any) -> Tensor:
        with HiddenCapture(self.module) as capture:
            output = run(self.module, self._forward, batch)
        hidden = capture.last if capture.last is not None else output
        if not isinstance(hidden, Tensor):
            raise InputError(f"the model returns {type(hidden).__name__} and runs no linear layer. Pass forward=.")
        return hidden.float()


def mean_change(hidden: Iterable[Tensor], target: Sequence[Tensor]) -> float:
    """Return the mean of |h - t| over all elements of all batches."""
    total = sum(float((h - t).abs().double().sum()) for h, t in zip(hidden, target, strict=True))
    return total / max(1, sum(t.numel() for t in target))


class HiddenCapture:
    """A context in which `last` is the input of the linear layer of `module` that ran last."""

    def __init__(self, module: nn.Module) -> None:
        self._layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        self._hooks: list[Any] = []
        self.last: Tensor | None = None

    def __enter__(self) -> HiddenCapture:
        self._hooks = [layer.register_forward_pre_hook(self._keep, with_kwargs=True) for layer in self._layers]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.last = (arguments[0] if arguments else named["input"]).detach()
