"""The weights of a live module: keep them, exchange them, take a part of them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from dtrain.errors import InputError
from dtrain.weights import Weights, read_weights


@contextmanager
def kept(module: nn.Module) -> Generator[Weights]:
    """Yield a copy of the module's weights, and put it back in the end, whatever happened."""
    live = read_weights(module)
    copy = replace(live, tensors={name: tensor.clone() for name, tensor in live.tensors.items()})
    try:
        yield copy
    finally:
        load_weights(module, copy.tensors)


@torch.no_grad()
def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy into the module's tensors those that fit; a fresh head of another shape stays as it is."""
    own = read_weights(module)
    for name, tensor in tensors.items():
        target = own.get(name)
        if target is not None and target.shape == tensor.shape:
            target.copy_(tensor)


def part_of(weights: Weights, name: str) -> Weights | None:
    """Return the weights of the submodule called `name`, by the names they have there; None if there are none."""
    prefix = f"{name}." if name else ""
    every = {**{n: n for n in weights.tensors}, **weights.aliases}
    part = {n[len(prefix) :]: weights.tensors[holder] for n, holder in every.items() if n.startswith(prefix)}
    return replace(read_weights(part), origin=weights.origin) if part else None


def submodule(pl_module: pl.LightningModule, name: str) -> nn.Module:
    """Return the submodule called `name`; the module itself where it is empty.

    Raises:
        InputError: If there is none.
    """
    try:
        return pl_module.get_submodule(name)
    except AttributeError as error:
        names = ", ".join(name for name, _ in pl_module.named_children())
        raise InputError(f"the module has no submodule {name!r}. It has: {names}.") from error


def without_counters(tuned: Weights, base: Weights, module: nn.Module) -> Weights:
    """Return `tuned` with the base's value for what is no weight: it is left out where the base does not have it.

    Metric states can be in a state dict, but `load_state_dict` alone writes to them: a delta could not be applied.
    """
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    weights = {name.replace("_orig_mod.", "") for name, _ in named}
    counters = {name for name in read_weights(module).tensors if name not in weights}
    kept = {name: base.get(name) if name in counters else tensor for name, tensor in tuned.tensors.items()}
    return replace(tuned, tensors={name: tensor for name, tensor in kept.items() if tensor is not None})


def same_on_all_ranks(trainer: pl.Trainer, weights: Weights, module: nn.Module) -> Weights:
    """Return `weights` with the buffers of rank 0, the rank that writes: DDP keeps only the parameters equal."""
    if trainer.world_size == 1:
        return weights
    buffers = {name.replace("_orig_mod.", "") for name, _ in module.named_buffers()}
    mine = {name: tensor.cpu() for name, tensor in weights.tensors.items() if name in buffers}
    theirs = {n: t.to(weights.tensors[n].device) for n, t in trainer.strategy.broadcast(mine).items()}
    return replace(weights, tensors={**weights.tensors, **theirs})
