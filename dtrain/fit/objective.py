"""Objectives: what a fit looks at. They see training inputs only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, log_softmax, mse_loss

from dtrain.errors import InputError
from dtrain.fit.running import call, run, with_tensors

Measure = Literal["mse", "top", "kl"]


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


@runtime_checkable
class Differentiable(Objective, Protocol):
    """An objective that is a mean over batches and has gradients, so that scales can be learnt from it."""

    @property
    def batches(self) -> int:
        """Number of batches."""
        ...

    def batch_loss(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of one batch, a scalar.

        Args:
            index: Number of the batch.
            tensors: Stand in for the module's own of these names, and get gradients; None for no gradients.
        """
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


class OutputChange(ABC):
    """How much something that the model computes differs from what the fine-tuned model computes, on unlabelled inputs.

    Args:
        module: The model; its tensor names are the delta's.
        batches: Training inputs without augmentation. A mapping is passed by keyword, a sequence by position, anything
            else as the only argument. Padding is left out where a mapping has an `attention_mask` that fits.
        forward: Runs the model on one batch, where calling the module on it is not right.

    Raises:
        InputError: If there are no batches.
    """

    label: str

    def __init__(
        self, module: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], object] | None = None
    ) -> None:
        self.module, self._batches, self._forward = module, list(batches), forward or call
        if not self._batches:
            raise InputError("`batches` is empty. Give at least one batch of training inputs.")
        self._target: list[tuple[Tensor, ...]] = []

    @property
    def batches(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def remember(self) -> None:
        """Cache what the fine-tuned model computes."""
        # Copies: a model may return one of its weights, which the fit writes to.
        self._target = [self._keep(self._seen(batch, None).clone()) for batch in self._batches]

    def loss(self) -> float:
        """Return the mean over all elements of all batches."""
        self._check_target()
        sizes = [target[0].numel() for target in self._target]
        return sum(float(self.batch_loss(i)) * size for i, size in enumerate(sizes)) / max(1, sum(sizes))

    def batch_loss(self, index: int, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of one batch, a scalar in float32, differentiable with respect to `tensors`."""
        self._check_target()
        target = self._target[index]
        if not target[0].numel():
            return torch.zeros(())
        return self._compare(self._seen(self._batches[index], tensors), *target)

    def _keep(self, seen: Tensor) -> tuple[Tensor, ...]:
        """Return what has to be kept of what the fine-tuned model computes."""
        return (seen,)

    def _seen(self, batch: Any, tensors: Mapping[str, Tensor] | None) -> Tensor:
        if tensors is None:
            found = self._look(batch, grad=False).detach()
        else:
            found = with_tensors(self.module, tensors, lambda: self._look(batch, grad=True))
        return _without_padding(found, batch).float()

    def _check_target(self) -> None:
        if not self._target:
            raise InputError(
                f"{type(self).__name__} has nothing to compare with. Call remember() with the fine-tuned weights first."
            )

    @abstractmethod
    def _look(self, batch: Any, *, grad: bool) -> Tensor:
        """Run the model on a batch and return what is compared."""

    @abstractmethod
    def _compare(self, found: Tensor, *target: Tensor) -> Tensor:
        """Return the mean difference between what is computed now and what was kept, a scalar."""


class HiddenChange(OutputChange):
    """Mean absolute change of the last hidden state, on unlabelled inputs (q_e of DAREx, for encoders).

    The last hidden state is what the model returns by that name, as encoders of Hugging Face do; else it is taken to be
    the input of the linear layer that runs last (a reading that holds for any module with a head), and where no linear
    layer runs, the model's output.

    Args:
        module: The model; its tensor names are the delta's.
        batches: Training inputs without augmentation. A mapping is passed by keyword, a sequence by position, anything
            else as the only argument. Padding is left out where a mapping has an `attention_mask` that fits.
        forward: Runs the model on one batch, where calling the module on it is not right.

    Raises:
        InputError: If there are no batches.
    """

    label = "hidden change"

    def _look(self, batch: Any, *, grad: bool) -> Tensor:
        with HiddenCapture(self.module) as capture:
            output = run(self.module, self._forward, batch, grad=grad)
        own: object = getattr(output, "last_hidden_state", None)  # a pooler may run after it, on one token
        hidden = own if isinstance(own, Tensor) else capture.last if capture.last is not None else output
        if not isinstance(hidden, Tensor):
            raise InputError(f"the model returns {type(hidden).__name__} and runs no linear layer. Pass forward=.")
        return hidden

    def _compare(self, found: Tensor, *target: Tensor) -> Tensor:
        return l1_loss(found, target[0])


class LogitChange(OutputChange):
    """Change of the model's logits, on unlabelled inputs (BitDelta's distillation; q_e of DAREx, for decoders).

    Args:
        module: The model; its tensor names are the delta's. It returns a tensor, or something with `logits`.
        batches: Training inputs without augmentation. A mapping is passed by keyword, a sequence by position, anything
            else as the only argument. Padding is left out where a mapping has an `attention_mask` that fits.
        forward: Runs the model on one batch, where calling the module on it is not right.
        measure: "mse" for the mean squared change of all logits; "top" for that of the `top` greatest logits of the
            fine-tuned model; "kl" for the divergence of the softmax from the fine-tuned model's, in nats per element.
        top: Logits that "top" looks at, at least 1.

    Raises:
        InputError: If there are no batches, or an argument is out of its range.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Iterable[Any],
        forward: Callable[[nn.Module, Any], object] | None = None,
        measure: Measure = "mse",
        top: int = 5,
    ) -> None:
        super().__init__(module, batches, forward)
        if measure not in ("mse", "top", "kl"):
            raise InputError(f"`measure` must be 'mse', 'top' or 'kl', got {measure!r}.")
        if top < 1:
            raise InputError(f"`top` must be at least 1, got {top}. The paper uses top=5.")
        self._measure: Measure = measure
        self._top = top
        self.label = {"mse": "logit mse", "top": f"top-{top} logit mse", "kl": "logit divergence"}[measure]

    def _look(self, batch: Any, *, grad: bool) -> Tensor:
        return _logits(run(self.module, self._forward, batch, grad=grad))

    def _keep(self, seen: Tensor) -> tuple[Tensor, ...]:
        if self._measure != "top":  # of a large vocabulary a few logits are little
            return (seen,)
        best = seen.topk(min(self._top, seen.shape[-1]), dim=-1)
        return best.values, best.indices

    def _compare(self, found: Tensor, *target: Tensor) -> Tensor:
        if self._measure == "kl":
            if found.shape[-1] < 2:
                raise InputError("measure='kl' compares classes, and the model has one output. Use measure='mse'.")
            teacher, student = log_softmax(target[0], -1), log_softmax(found, -1)
            return (teacher.exp() * (teacher - student)).mean()
        return mse_loss(found.gather(-1, target[1]) if self._measure == "top" else found, target[0])


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
        self.last = arguments[0] if arguments else named["input"]


def _logits(output: Any) -> Tensor:
    """Return the logits among what a model returns: a tensor, something with `logits`, or the first of a tuple."""
    found, kind = output, type(output).__name__
    if isinstance(output, Mapping):
        found = cast("Mapping[str, Any]", output).get("logits")
    elif hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, (tuple, list)):
        found = next(iter(cast("Sequence[Any]", output)), None)
    if not isinstance(found, Tensor) or not found.ndim:
        raise InputError(
            f"the model returns {kind}, in which no logits were found. Pass forward=, a function of the model and the "
            "batch that returns them."
        )
    return found


def _without_padding(found: Tensor, batch: Any) -> Tensor:
    """Return the rows of real tokens, where the batch says which those are and `found` has a row for each token."""
    mask = cast("Mapping[str, Any]", batch).get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or found.ndim < 3 or mask.shape != found.shape[:2]:
        return found
    return found[mask.to(found.device).bool()]
