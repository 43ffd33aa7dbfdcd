"""`mergekit`'s DARE: it writes a dense model, so what is counted is Zstandard on its bits xor the base's.

That is the least that a user gets out of its file without another method: zeros where nothing changed, and the whole
float32 elsewhere. Its command knows architectures by name and writes nothing for these models, so what its
`dare_linear` does to one tensor is called tensor by tensor.
"""

from __future__ import annotations

from pathlib import Path

import torch
import zstandard
from safetensors.torch import load, save

from bench.quality.peers.disk import Peer
from bench.quality.peers.lossless import xor
from bench.tasks import State, Task

FILE = "delta.zst"
LEVEL = 19  # the positions are most of the file, and the higher levels are made for such


def merge(task: Task, density: float) -> State:
    """Return what mergekit's `dare_linear` of one model and its base is."""
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    torch.manual_seed(task.seed)
    merged: State = {}
    for name, base in task.base.items():
        delta = sparsify(task.tuned[name] - base, density, SparsificationMethod.random, rescale_norm=RescaleNorm.l1)
        merged[name] = (base + delta).to(base.dtype)
    return merged


def write(task: Task, knob: float, folder: Path) -> None:
    changed = xor(save(merge(task, knob)), save(task.base))
    (folder / FILE).write_bytes(zstandard.compress(changed, LEVEL))


def read(task: Task, folder: Path) -> State:
    return load(xor(zstandard.decompress((folder / FILE).read_bytes()), save(task.base)))


DARE = Peer("mergekit DARE, zstd on the xor", "mergekit", write, read, 2**-12, 0.1)
