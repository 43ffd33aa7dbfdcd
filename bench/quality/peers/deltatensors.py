"""`deltatensors`: its sparse, one-bit and four-bit modes, which treat every tensor alike."""

from __future__ import annotations

from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from bench.quality.peers.disk import Peer
from bench.tasks import State, Task

FILE = "delta.wdelta"


def write(task: Task, knob: float, folder: Path, strategy: str) -> None:
    import deltatensors

    options: dict[str, Any] = {"sparsity": 1 - knob} if strategy == "sparse" else {}
    with redirect_stdout(StringIO()):  # it says on standard output what it does
        deltatensors.save_delta(folder / FILE, task.tuned, task.base, strategy=strategy, use_gpu=False, **options)


def read(task: Task, folder: Path) -> State:
    import deltatensors

    with redirect_stdout(StringIO()):
        found = deltatensors.load_delta(folder / FILE, task.base)
    return {name: torch.from_numpy(found[name]).to(tensor.dtype) for name, tensor in task.base.items()}


def mode(label: str, strategy: str, low: float | None = None, high: float = 1.0) -> Peer:
    return Peer(f"deltatensors, {label}", "deltatensors", partial(write, strategy=strategy), read, low, high)


SPARSE = mode("sparse", "sparse", 2**-20, 0.1)
ONE_BIT = mode("one bit", "quantized")
INT4 = mode("int4", "int4")  # with its default share of outliers
