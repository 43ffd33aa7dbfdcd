"""The pull toward the base as functions on tensors, shared by `AdamR` and `AdamRCallback`.

Nothing here waits for the device: rates and means stay 0-dim tensors, only step counts kept on the CPU are read.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dtrain.errors import InputError

Norm = Literal["l2", "l1"]
Normalizer = Literal["stable", "none"]


def check_decay(strength: object, norm: object, normalizer: object) -> None:
    """Refuse settings that no decay can be run with.

    Raises:
        InputError: If `strength` is no finite number of at least zero, or `norm` or `normalizer` is not a known word.
    """
    if not isinstance(strength, int | float) or not 0 <= strength < math.inf:
        raise InputError(f"`strength` must be a finite number >= 0, got {strength!r}. Use 0 for plain Adam.")
    for name, value, known in (("norm", norm, Norm), ("normalizer", normalizer, Normalizer)):
        if value not in get_args(known):
            words = " or ".join(map(repr, get_args(known)))
            raise InputError(f"`{name}` must be {words}, got {value!r}. Use `{name}={get_args(known)[0]!r}`.")


def second_moment_sum(
    exp_avg_sqs: Sequence[Tensor], steps: Sequence[Tensor], beta2: float, grads: Sequence[Tensor] | None = None
) -> Tensor:
    """Sum all elements of the bias-corrected second moments.

    The moment is linear in its past, so its sum *after* a step that sees `grads` is known before the step, and Adam
    itself can stay torch's own code: `sum(v') = beta2 * sum(v) + (1 - beta2) * sum(g^2)`.

    Args:
        exp_avg_sqs: Adam's second moments, one per parameter; at least one.
        steps: The updates each of them has seen, as Adam counts them: 0-dim tensors on the CPU, or beside the
            parameter where the optimizer is fused or capturable.
        beta2: Their decay.
        grads: The gradients of the step to come. Without them the moments are taken as they are.

    Returns:
        A 0-dim tensor on the device of the first moment.
    """
    # Bias correction is one division per distinct step count: usually one for the whole model.
    buckets: defaultdict[tuple[torch.device, float | None], list[int]] = defaultdict(list)
    for index, (moment, step) in enumerate(zip(exp_avg_sqs, steps, strict=True)):
        updates = step.item() if step.is_cpu else None  # on the CPU it costs nothing; elsewhere it would wait
        buckets[moment.device, updates].append(index)
    total = torch.zeros((), device=exp_avg_sqs[0].device)
    for (_, updates), members in buckets.items():
        seen = torch.stack([steps[i] for i in members]) if updates is None else updates
        sums = _sums([exp_avg_sqs[i] for i in members])
        if grads is not None:
            seen = seen + 1
            sums = beta2 * sums + (1 - beta2) * _sums_of_squares([grads[i] for i in members])
        total = total + (sums / (1 - beta2**seen)).sum().to(total.device)
    return total


def mean_second_moment(sums: Sequence[Tensor], count: int) -> Tensor:
    """Return `sum(sums) / count`, or 1 where that is zero: without gradients there is nothing to normalise by."""
    mean = functools.reduce(lambda total, part: total + part.to(total.device), sums) / count
    return torch.where(mean > 0, mean, torch.ones_like(mean))


def optimizer_second_moment(optimizer: Optimizer) -> Tensor | None:
    """Return the mean second moment that an Adam-like optimizer holds for the parameters that have a gradient.

    Returns:
        A 0-dim tensor, or None if no parameter has a gradient.

    Raises:
        InputError: If the optimizer keeps no such moment.
    """
    sums: list[Tensor] = []
    count = 0
    for group in optimizer.param_groups:
        params = [param for param in group["params"] if param.grad is not None]
        states = [optimizer.state[param] for param in params]
        if "betas" not in group or not all({"exp_avg_sq", "step"} <= state.keys() for state in states):
            raise InputError(
                f"`normalizer='stable'` needs an optimizer that keeps `exp_avg_sq`, and {type(optimizer).__name__} "
                "does not. Use `normalizer='none'`, or Adam."
            )
        if params:
            moments, steps = [state["exp_avg_sq"] for state in states], [state["step"] for state in states]
            sums.append(second_moment_sum(moments, steps, group["betas"][1]))
            count += sum(param.numel() for param in params)
    return mean_second_moment(sums, count) if sums else None


def decay_rate(strength: float, lr: float | Tensor, mean: Tensor | None) -> Tensor | float:
    """Return `strength * lr / sqrt(mean)`, or `strength * lr` where the mean second moment is None."""
    rate = strength * lr
    return rate if mean is None else rate / mean.sqrt()


@torch.no_grad()
def decay_(params: Sequence[Tensor], bases: Sequence[Tensor], rate: Tensor | float, norm: Norm) -> None:
    """Move `params` toward their `bases` in place.

    `"l2"` multiplies every delta by `1 - rate`, with the rate cut at 1, where the delta is gone: above 1 the published
    rule overshoots, above 2 it diverges. `"l1"` is the proximal step: every element of the delta moves toward zero by
    `rate` and stops there, so that it becomes exactly zero.

    bf16 and fp16 parameters are moved in float32 and rounded once.
    """
    pull_ = _scale_delta_ if norm == "l2" else _threshold_delta_
    for param, base in zip(params, bases, strict=True):
        work = _accumulator(param)
        pull_(param, base, rate.to(param.device, work) if isinstance(rate, Tensor) else rate, work)


@torch.no_grad()
def relative_norm(params: Sequence[Tensor], bases: Sequence[Tensor]) -> Tensor:
    """Return the norm of all deltas over the norm of all bases."""
    squares = [
        (_sums_of_squares([param.float() - base.float()]), _sums_of_squares([base.float()]))
        for param, base in zip(params, bases, strict=True)
    ]
    delta, base = (
        torch.cat([part.to(params[0].device) for part in parts]).sum() for parts in zip(*squares, strict=True)
    )
    return (delta / base.clamp(min=torch.finfo(base.dtype).tiny)).sqrt()


class ClampCounter:
    """Counts the steps whose L2 pull had to be cut at 1.

    The count stays on the device; reading `value` is the only thing that waits for it.
    """

    def __init__(self, value: int = 0) -> None:
        self._steps: int | Tensor = value

    def add(self, rates: Sequence[Tensor | float]) -> None:
        """Count one step if any of its `rates` is above 1."""
        over = [rate > 1 for rate in rates]
        if any(isinstance(flag, bool) and flag for flag in over):
            self._steps = self._steps + 1
        elif flags := [flag for flag in over if isinstance(flag, Tensor)]:
            self._steps = functools.reduce(torch.logical_or, flags) + self._steps

    @property
    def value(self) -> int:
        """The number of steps so far."""
        return int(self._steps)


def _scale_delta_(param: Tensor, base: Tensor, rate: Tensor | float, work: torch.dtype) -> None:
    rate = rate.clamp(max=1) if isinstance(rate, Tensor) else min(rate, 1.0)
    if param.dtype == work:
        param.lerp_(base, rate)  # one pass, no temporary
    else:
        param.copy_(param.to(work).lerp_(base.to(work), rate))


def _threshold_delta_(param: Tensor, base: Tensor, rate: Tensor | float, work: torch.dtype) -> None:
    base = base.to(work)
    delta = param.to(work) - base
    number = cast(float, rate)  # clamp takes a 0-dim tensor as well, but its stubs know no union of the two
    inside = delta.clamp(-number, number)
    # Subtracted from the delta, not from the weight: what lies inside the threshold becomes exactly zero.
    torch.add(base, delta.sub_(inside), out=param)


def _accumulator(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _sums(moments: list[Tensor]) -> Tensor:
    """Return the sum of each moment."""
    if moments[0].is_cuda:
        return _norms(moments, 1)  # a moment is never negative
    return torch.stack([moment.sum(dtype=_accumulator(moment)) for moment in moments])


def _sums_of_squares(grads: list[Tensor]) -> Tensor:
    """Return the sum of squares of each gradient."""
    if grads[0].is_cuda:
        return _norms(grads, 2).square()
    # Row by row: a single float32 norm on the CPU adds up linearly and is several percent off for a large embedding.
    rows = [grad.flatten(1) if grad.dim() > 1 else grad.reshape(1, -1) for grad in grads]
    return torch.stack([_row_norms(row).square().sum() for row in rows])


def _norms(tensors: list[Tensor], order: int) -> Tensor:
    """Return the norm of each tensor: one launch on CUDA, where a loop would be hundreds."""
    # No public twin takes a dtype.
    norms = torch._foreach_norm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        tensors, order, dtype=_accumulator(tensors[0])
    )
    return torch.stack(norms)


def _row_norms(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
        matrix, dim=1, dtype=_accumulator(matrix)
    )
