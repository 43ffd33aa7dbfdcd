"""What a step of AdamR costs beside torch's AdamW: the same float32 parameters, the optimizers in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from bench.speed.clock import Seconds, timed
from bench.speed.contenders import Kind, Steps
from bench.speed.pairs import DELTA, WEIGHTS, Size, shapes
from dtrain.optim import AdamR

Build = Callable[[list[nn.Parameter]], Optimizer]
LR, STRENGTH, WARM_UP = 1e-5, 0.01, 2
COPY = "memory copy"
BUILD: dict[str, Build] = {
    "AdamW fused": lambda params: AdamW(params, lr=LR, fused=True),
    "AdamW foreach": lambda params: AdamW(params, lr=LR, foreach=True),
    "AdamW single tensor": lambda params: AdamW(params, lr=LR, foreach=False),
    "AdamR fused": lambda params: AdamR(params, lr=LR, strength=STRENGTH, fused=True),
    "AdamR foreach": lambda params: AdamR(params, lr=LR, strength=STRENGTH, foreach=True),
    "AdamR single tensor": lambda params: AdamR(params, lr=LR, strength=STRENGTH, foreach=False),
    "AdamR fused, no normalizer": lambda params: AdamR(params, lr=LR, strength=STRENGTH, normalizer="none", fused=True),
    "AdamR fused, l1": lambda params: AdamR(params, lr=LR, strength=STRENGTH, norm="l1", fused=True),
}


def step_turns(size: Size, names: Sequence[str], rounds: int) -> dict[str, Any]:
    """Return by optimizer the seconds of every step after the warm-up; all of them step the same parameters."""
    params = [nn.Parameter(torch.randn(shape) * WEIGHTS) for shape in shapes(size).values()]
    for param in params:
        param.grad = torch.randn_like(param) * DELTA
    calls: dict[str, Callable[[], Any]] = {COPY: lambda: [param.detach().clone() for param in params]}
    calls |= {name: BUILD[name](params).step for name in names}
    found: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(WARM_UP + rounds):
        for name, call in calls.items():
            ((_, seconds),) = timed(one(call))
            if turn >= WARM_UP:
                found[name].append(seconds)
    size_bytes = sum(param.nbytes for param in params)
    return {n: {"kind": kind(n), "steps": {"step": s}, "bytes": size_bytes} for n, s in found.items()}


def one(call: Callable[[], Any]) -> Steps[None]:
    call()
    yield "step"


def kind(name: str) -> Kind:
    return "floor" if name == COPY else "dtrain" if name.startswith("AdamR") else "peer"
