"""AdamR: Adam that pulls the weights toward the base they start from, so that the delta stays small."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import Optimizer, ParamsT
from typing_extensions import override

from dtrain.errors import InputError
from dtrain.optim.decay import (
    ClampCounter,
    Norm,
    Normalizer,
    check_decay,
    decay_,
    decay_rate,
    mean_second_moment,
    second_moment_sum,
)


class AdamR(Optimizer):
    """Adam with a decoupled decay of the delta `W - W0` instead of the weights.

    Every step first pulls the weights toward their base and then does Adam's own update, which is torch's own code::

        vbar = mean of Adam's bias-corrected second moment, this step's gradient included, over all parameters of the
               optimizer that have a gradient (1 where that is zero)
        rate = strength * lr / sqrt(vbar)                   # normalizer="none": strength * lr
        W    = W - min(rate, 1) * (W - W0)                  # norm="l2"
        W    = W0 + soft_threshold(W - W0, rate)            # norm="l1"
        W    = W - lr * m_hat / (sqrt(v_hat) + eps)

    The base `W0` is the weights at the first step that gives a parameter a gradient. It is one more tensor in
    `state[p]["base"]`, so a checkpoint of the optimizer carries it and a resumed run goes on with the right one.
    Parameters without a gradient are left alone. `strength=0` is `torch.optim.Adam` bit for bit, and keeps no base.

    Example::

        optimizer = dtrain.AdamR(model.parameters(), lr=1e-5, strength=0.01)
        optimizer = dtrain.AdamR([{"params": matrices}, {"params": others, "strength": 0.0}], lr=1e-5, strength=0.01)

    Note:
        Source: "DARE the Extreme: Revisiting Delta-Parameter Pruning For Fine-Tuned Model" (DAREx, arXiv 2410.09344)
        and its published code; the normaliser is that of stable weight decay (AdamS). The order of the steps and the
        one `vbar` for the whole model are the code's. Deviations: the L2 rate is cut at 1 (see `clamped_steps`); L1 is
        the proximal step, where the code uses a plain subgradient; the base is kept per parameter, where the code
        matches it by position and a second group breaks it; `strength` has no default, because none was published.

    Note:
        `vbar` is the mean over what this process holds. That is the model on one device and under DDP; it is not under
        FSDP, so DTensor parameters are refused.

    Args:
        params: Parameters, named parameters or parameter groups. A group may set any option below for itself.
        lr: Step size.
        betas: Decay of the running means of the gradient and of its square.
        eps: Added to the denominator of Adam's update.
        strength: How hard to pull. The right value depends on `normalizer` and on the task: tune it.
        norm: `"l2"` shrinks all of the delta by the same factor, `"l1"` makes small elements exactly zero.
        normalizer: `"stable"` divides the pull by `sqrt(vbar)`, `"none"` does not: AdamW in the variable `W - W0`.
        foreach: Passed to torch's Adam.
        fused: Passed to torch's Adam.

    Raises:
        InputError: If an option is out of range, a parameter is complex or a DTensor, a gradient is sparse, or
            `strength` is raised from 0 for a parameter that was already trained without a base.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        strength: float,
        norm: Norm = "l2",
        normalizer: Normalizer = "stable",
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        self._clamped = ClampCounter()
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "strength": strength,
            "norm": norm,
            "normalizer": normalizer,
            "foreach": foreach,
            "fused": fused,
        }
        super().__init__(params, defaults)

    @property
    def clamped_steps(self) -> int:
        """Steps of this object in which the L2 rate was above 1 and was cut. Reading it waits for the device.

        Many of them say that `strength * lr` is too large for the gradients at hand: each one puts the weights back on
        the base before Adam's update.
        """
        return self._clamped.value

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group with its own options, as `torch.optim.Optimizer.add_param_group` does, and check it."""
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
        except InputError:
            self.param_groups.pop()
            raise

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_clamped", ClampCounter())  # torch pickles only defaults, state and groups
        for group in self.param_groups:  # a state dict of torch.optim.Adam knows nothing of ours
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Pull the weights toward the base, then update them as Adam does.

        Args:
            closure: Re-evaluates the model and returns the loss.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = [batch for group in self.param_groups if (batch := self._gather(group)).params]
        self._decay(batches)
        for batch in batches:
            _adam(batch)
        return loss

    def _gather(self, group: dict[str, Any]) -> _Batch:
        """Collect what has a gradient, with its state, which is made on the first sight."""
        batch = _Batch(group)
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.is_sparse:
                raise InputError(
                    f"AdamR got a sparse gradient for a parameter of shape {tuple(param.shape)}; it needs dense ones. "
                    "Build the embedding with `sparse=False`, or give it torch.optim.SparseAdam."
                )
            state = self.state[param]
            if not state:
                state.update(_first_state(param, group))
            if group["strength"] and "base" not in state:
                raise InputError(
                    f"`strength` is {group['strength']}, but a parameter of shape {tuple(param.shape)} was trained "
                    "without a base so far, so there is nothing to pull it to. Build a new AdamR on the base weights, "
                    "or keep `strength` above 0 from the first step on."
                )
            batch.params.append(param)
            batch.grads.append(grad)
            batch.states.append(state)
        return batch

    def _decay(self, batches: list[_Batch]) -> None:
        """Pull the parameters of all groups that ask for it toward their base."""
        pulled = [batch for batch in batches if batch.group["strength"]]
        mean = None
        if any(batch.group["normalizer"] == "stable" for batch in pulled):
            sums = [second_moment_sum(b.of("exp_avg_sq"), b.of("step"), b.group["betas"][1], b.grads) for b in batches]
            mean = mean_second_moment(sums, sum(param.numel() for b in batches for param in b.params))
        rates: list[Tensor | float] = []
        for batch in pulled:
            group = batch.group
            rate = decay_rate(group["strength"], group["lr"], mean if group["normalizer"] == "stable" else None)
            decay_(batch.params, batch.of("base"), rate, group["norm"])
            if group["norm"] == "l2":
                rates.append(rate)
        self._clamped.add(rates)


@dataclass
class _Batch:
    """The part of a parameter group that has a gradient in this step."""

    group: dict[str, Any]
    params: list[Tensor] = field(default_factory=list[Tensor])
    grads: list[Tensor] = field(default_factory=list[Tensor])
    states: list[dict[str, Tensor]] = field(default_factory=list[dict[str, Tensor]])

    def of(self, key: str) -> list[Tensor]:
        return [state[key] for state in self.states]


def _first_state(param: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return Adam's state before its first update, and the base where the group needs one."""
    state = {
        # torch's own choice: counting on the CPU costs no launch, but a fused kernel reads the count on its device.
        "step": torch.zeros((), dtype=torch.float32, device=param.device if group["fused"] else "cpu"),
        "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
    }
    if group["strength"]:
        state["base"] = param.detach().clone(memory_format=torch.preserve_format)
    return state


def _adam(batch: _Batch) -> None:
    # The function, not super().step() of torch.optim.Adam: torch wraps `step` of every class with the step hooks, and
    # the inherited one would run them a second time.
    group = batch.group
    adam(
        batch.params,
        batch.grads,
        batch.of("exp_avg"),
        batch.of("exp_avg_sq"),
        [],
        batch.of("step"),
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=0.0,
        eps=group["eps"],
        maximize=False,
    )


def _check_group(group: Mapping[str, Any]) -> None:
    """Refuse options and parameters that `AdamR` cannot step."""
    check_decay(group["strength"], group["norm"], group["normalizer"])
    for name in ("lr", "eps"):
        if not isinstance(group[name], int | float) or not group[name] >= 0:
            raise InputError(f"`{name}` must be a number >= 0, got {group[name]!r}. Use the default by leaving it out.")
    pair = cast("tuple[object, ...]", group["betas"]) if isinstance(group["betas"], tuple | list) else ()
    if len(pair) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in pair):
        raise InputError(f"`betas` must be two numbers in [0, 1), got {group['betas']!r}. Use `betas=(0.9, 0.999)`.")
    if group["foreach"] and group["fused"]:
        raise InputError("`foreach` and `fused` are both True; they name two ways to do the same. Set one of them.")
    for param in group["params"]:
        if param.is_complex():
            raise InputError(f"AdamR got a complex parameter of shape {tuple(param.shape)}; give it torch.optim.Adam.")
        # By name: importing torch.distributed.tensor to ask would cost most of a second.
        if any(parent.__name__ == "DTensor" for parent in type(param).__mro__):
            raise InputError(
                f"AdamR got a DTensor of shape {tuple(param.shape)}; its mean over all parameters would be that of one "
                "shard. Train without sharding (one device or DDP), or with another optimizer."
            )
