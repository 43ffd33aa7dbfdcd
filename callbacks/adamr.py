"""AdamR as a callback: pull the weights toward the base after every step of any torch optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from dtrain.callbacks.strategies import refuse_sharded
from dtrain.errors import InputError
from dtrain.optim import AdamR
from dtrain.optim.decay import (
    ClampCounter,
    Norm,
    Normalizer,
    check_decay,
    decay_,
    decay_rate,
    optimizer_second_moment,
    relative_norm,
)
from dtrain.rules import Rules

#: Where the base lies in `optimizer.state[parameter]`. Another word than the one of `AdamR`, so that neither mistakes
#: the other's checkpoint for its own.
BASE_KEY = "adamr_base"


class AdamRCallback(Callback):
    """Keep the delta small while training: after each optimizer step, pull the weights toward the base.

    The base is the weights at the start of training. One copy of each selected parameter is kept in the state of its
    optimizer, so a checkpoint carries it, and resuming with `ckpt_path` goes on with the right base. The module and
    the names in its state dict stay as they are.

    Works with every torch optimizer, with gradient accumulation, mixed precision, manual optimization and DDP. It logs
    `adamr/clamped_steps` and `adamr/delta_norm` (the norm of the delta over the norm of the base) once per epoch.

    Example::

        from dtrain.callbacks import AdamRCallback

        trainer = L.Trainer(callbacks=[AdamRCallback(strength=0.01)])

    Note:
        Source: DAREx (arXiv 2410.09344) and its published code, see `dtrain.AdamR`, which is the exact rule. This
        callback pulls *after* the step instead of before, which differs by (rate x update), of second order; and it
        pulls only matrices, where the code also pulls norms, biases and the fresh head.

    Note:
        Lightning only warns when a run is resumed without this callback: it would go on without the pull. A weight
        decay of the optimizer pulls the same parameters toward zero; set it to 0 for them.

    Args:
        strength: How hard to pull. The right value depends on `normalizer` and on the task: tune it. 0 does nothing.
        norm: `l2` shrinks all of the delta by the same factor, `l1` makes small elements exactly zero.
        normalizer: `stable` divides the pull by the root of Adam's mean second moment, which needs an optimizer that
            keeps `exp_avg_sq` (Adam, AdamW, NAdam, RAdam); `none` works with every optimizer.
        include: Shell-style patterns of the parameter names to pull. Norms, biases and fresh heads never are.
        exclude: Patterns of the parameter names to leave alone.

    Raises:
        InputError: If a setting is out of range; at `fit`, if the strategy, the optimizer or the checkpoint to resume
            from cannot be used.
    """

    def __init__(
        self,
        strength: float,
        norm: Norm = "l2",
        normalizer: Normalizer = "stable",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        check_decay(strength, norm, normalizer)
        self._rules = Rules(include=include, exclude=exclude, embeddings=())  # to leave them there, pull them too
        self.strength = strength
        self.norm: Norm = norm
        self.normalizer: Normalizer = normalizer
        self.include = list(include)
        self.exclude = list(exclude)
        self._clamped = ClampCounter()
        self._resumed = False
        self._loaded: dict[str, Any] | None = None  # our part of the checkpoint that the run was resumed from
        self._names: dict[Tensor, str] = {}  # the selected parameters
        self._waiting: dict[Tensor, Tensor] = {}  # bases whose optimizer state does not exist yet
        self._handles: list[RemovableHandle] = []

    @property
    @override
    def state_key(self) -> str:
        """Two callbacks may pull different parameters, each with its own strength."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def clamped_steps(self) -> int:
        """Optimizer steps in which the L2 rate was above 1 and was cut. Reading it waits for the device."""
        return self._clamped.value

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage begins: refuse the strategies that this callback cannot work with."""
        if stage != "fit":
            return
        self._resumed, self._loaded, self._clamped = False, None, ClampCounter()
        why = "the mean over all parameters would be that of one shard, and DeepSpeed never calls the optimizer's hooks"
        refuse_sharded(trainer, "AdamRCallback", why)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Called when a checkpoint is restored, whether or not this callback was there when it was written."""
        self._resumed = True

    @override
    def state_dict(self) -> dict[str, Any]:
        """Called when a checkpoint is saved: leave a mark, in plain values. The bases go with the optimizer."""
        return {**self._settings(), "clamped_steps": self.clamped_steps}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Called when a checkpoint is restored that was written with this callback."""
        self._loaded = dict(state_dict)
        self._clamped = ClampCounter(state_dict["clamped_steps"])

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training begins, with weights and optimizer state restored: take the bases, hook the steps."""
        self._compare_settings()
        if self.strength == 0:
            return
        self._names = self._select(pl_module)
        for optimizer in trainer.optimizers:
            if isinstance(optimizer, AdamR):
                raise InputError(
                    "AdamRCallback found dtrain.AdamR as the optimizer: the delta would be pulled twice. Remove the "
                    "callback, or return torch.optim.Adam from `configure_optimizers`."
                )
            self._remember_bases(optimizer)
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._warn(trainer.optimizers)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called when a batch begins: parameters may have been unfrozen since, as `BaseFinetuning` does."""
        for optimizer in trainer.optimizers:
            self._remember_bases(optimizer)

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when an epoch ends: log how far the weights are from the base."""
        pairs = [
            (param, state[BASE_KEY])
            for optimizer in trainer.optimizers
            for param, state in optimizer.state.items()
            if param in self._names and BASE_KEY in state
        ]
        if pairs:
            # Equal on all processes; `sync_dist` only spares the warning of Lightning.
            pl_module.log("adamr/delta_norm", relative_norm(*zip(*pairs, strict=True)), sync_dist=True)
            pl_module.log("adamr/clamped_steps", float(self.clamped_steps), sync_dist=True)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Called when training ends: let go of optimizers and parameters."""
        self._detach()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Called when the run is interrupted: let go of optimizers and parameters."""
        self._detach()

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Called when a stage ends: let go of optimizers and parameters."""
        self._detach()

    def _settings(self) -> dict[str, Any]:
        return {"strength": self.strength, "norm": self.norm, "normalizer": self.normalizer}

    def _compare_settings(self) -> None:
        """Say so if the run goes on with other settings than it was begun with."""
        for name, value in self._settings().items() if self._loaded is not None else ():
            before = (self._loaded or {}).get(name)
            if before != value:
                rank_zero_warn(
                    f"AdamRCallback goes on with `{name}={value!r}`, but the checkpoint was written with {before!r}."
                )

    def _select(self, pl_module: pl.LightningModule) -> dict[Tensor, str]:
        """Return the parameters to pull, with their names as they were before torch.compile."""
        named = [(name.replace("_orig_mod.", ""), param) for name, param in pl_module.named_parameters()]
        chosen: dict[Tensor, str] = {
            param: name for name, param in named if self._rules.role(name, param.shape, param.dtype) == "method"
        }
        if not chosen:
            raise InputError(
                f"AdamRCallback found no matrix to pull: `include={self.include}` and `exclude={self.exclude}` leave "
                f"none of {len(named)} parameters. Match the names that `pl_module.named_parameters()` gives."
            )
        return chosen

    def _remember_bases(self, optimizer: Optimizer) -> None:
        """Copy the weights that this optimizer has not moved yet.

        The copies wait beside the optimizer: put into its state before the first step, they would make Adam believe
        that the state exists already.
        """
        for param in _trainable(optimizer):
            if param not in self._names or param in self._waiting or BASE_KEY in optimizer.state.get(param, {}):
                continue
            # Every step of a run with this callback leaves a base behind, so what has none has not moved. The rest of
            # the optimizer's state does not tell: Adagrad's is there from the start, and plain SGD never has any.
            if self._resumed and not (self._loaded or {}).get("strength"):
                raise InputError(
                    f"The checkpoint has no base for {self._names[param]!r}: it was written without AdamRCallback, or "
                    "with `strength=0` or other patterns. Start from the base model instead of `ckpt_path`, or resume "
                    "with the callback that the run was begun with."
                )
            self._waiting[param] = param.detach().clone(memory_format=torch.preserve_format)

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pull what this step has moved. Runs inside `optimizer.step`, before a scheduler changes the step's lr."""
        mean = optimizer_second_moment(optimizer) if self.normalizer == "stable" else None
        # A fused optimizer skips a step with inf gradients inside its kernel, and this hook is called all the same.
        found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
        rates: list[Tensor | float] = []
        for group in optimizer.param_groups:
            params = [param for param in group["params"] if param.grad is not None and param in self._names]
            if not params:
                continue
            rate = decay_rate(self.strength, group["lr"], mean)
            if found_inf is not None:
                rate = torch.where(found_inf == 0, rate, 0.0)
            decay_(params, [self._base(optimizer, param) for param in params], rate, self.norm)
            rates.append(rate)
        if self.norm == "l2":
            self._clamped.add(rates)

    def _base(self, optimizer: Optimizer, param: Tensor) -> Tensor:
        """Return the base of `param`, and move it to the optimizer's state on the first call."""
        state = optimizer.state[param]
        if BASE_KEY not in state:
            if param not in self._waiting:
                raise InputError(
                    f"{self._names[param]!r} was given to the optimizer within a batch and has moved before its base "
                    "could be copied. Add parameter groups in `on_train_epoch_start` or earlier."
                )
            state[BASE_KEY] = self._waiting[param]
        return state[BASE_KEY]

    def _warn(self, optimizers: list[Optimizer]) -> None:
        """Name, once, what works against the pull."""
        groups = [(g, [p for p in g["params"] if p in self._names]) for o in optimizers for g in o.param_groups]
        decayed = sum(len(params) for group, params in groups if group.get("weight_decay", 0))
        if decayed:
            rank_zero_warn(
                f"The optimizer's `weight_decay` pulls {decayed} parameters toward zero while AdamRCallback pulls them "
                "toward the base. Set `weight_decay=0` for them."
            )
        low = sum(param.dtype in (torch.bfloat16, torch.float16) for _, params in groups for param in params)
        if low:
            rank_zero_warn(
                f"AdamRCallback pulls {low} parameters kept in 16 bits: a pull smaller than half a rounding step is "
                "lost. Keep the weights in float32 (`precision='bf16-mixed'`)."
            )

    def _detach(self) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._names, self._waiting = {}, {}


def _trainable(optimizer: Optimizer) -> list[Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"] if param.requires_grad]
