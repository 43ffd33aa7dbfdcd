"""`sparse-llm`: its int8, sparse and low-rank codecs in the layout of its own delta folders.

Its commands read causal language models only, so the codecs are called tensor by tensor, as they do, and the files they
write are written. They read checkpoints in half precision; here the delta is taken in single precision and then
rounded, which is to its favour. Its manifest is left out but for the scales that int8 needs: names are those of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from bench.quality.peers.disk import Peer, bytes_on_disk
from bench.tasks import State, Task

PACKAGE = "sparse-llm"
SMALL = 1000  # elements up to which its low-rank mode stores a tensor as it is


def deltas(task: Task) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in task.tuned.items():
        yield name.replace(".", "_"), (tensor.float() - task.base[name].float()).half()


def restore(task: Task, load: Callable[[str, torch.Size], Tensor]) -> State:
    return {
        name: (base.float() + load(name.replace(".", "_"), base.shape).float()).to(base.dtype)
        for name, base in task.base.items()
    }


def write_int8(task: Task, knob: float, folder: Path) -> None:
    from core.delta import compress_delta_int8

    del knob  # there is none
    scales: dict[str, float] = {}
    for name, delta in deltas(task):
        codes, scales[name], _ = compress_delta_int8(delta)
        (folder / f"{name}.bin").write_bytes(codes)
    (folder / "manifest.json").write_text(json.dumps(scales))


def read_int8(task: Task, folder: Path) -> State:
    from core.delta import decompress_delta_int8

    scales = json.loads((folder / "manifest.json").read_text())

    def load(name: str, shape: torch.Size) -> Tensor:
        return decompress_delta_int8((folder / f"{name}.bin").read_bytes(), scales[name], tuple(shape))

    return restore(task, load)


def write_sparse(task: Task, knob: float, folder: Path) -> None:
    """Store what is above the threshold that leaves the share `knob` of the whole model."""
    from core.delta import compress_delta_sparse

    sizes = torch.cat([delta.abs().float().reshape(-1) for _, delta in deltas(task)])
    threshold = float(sizes.kthvalue(max(1, round((1 - knob) * sizes.numel()))).values)
    for name, delta in deltas(task):
        indices, values, _ = compress_delta_sparse(delta, threshold)
        torch.save({"indices": indices, "values": values}, folder / f"{name}.pt")


def read_sparse(task: Task, folder: Path) -> State:
    from core.delta import decompress_delta_sparse

    def load(name: str, shape: torch.Size) -> Tensor:
        found = torch.load(folder / f"{name}.pt", weights_only=True)
        return decompress_delta_sparse(found["indices"], found["values"], tuple(shape))

    return restore(task, load)


def write_low_rank(task: Task, knob: float, folder: Path) -> None:
    from core.delta import compress_delta_svd

    for name, delta in deltas(task):
        if factored(delta):
            left, right, _ = compress_delta_svd(delta, rank=int(knob))
            torch.save({"U": left, "V": right, "shape": delta.shape}, folder / f"{name}.pt")
        else:
            torch.save(delta, folder / f"{name}_direct.pt")


def read_low_rank(task: Task, folder: Path) -> State:
    from core.delta import decompress_delta_svd

    def load(name: str, shape: torch.Size) -> Tensor:
        if (folder / f"{name}_direct.pt").exists():
            return torch.load(folder / f"{name}_direct.pt", weights_only=True)
        found = torch.load(folder / f"{name}.pt", weights_only=True)
        return decompress_delta_svd(found["U"], found["V"], tuple(shape))

    return restore(task, load)


def factored(delta: Tensor) -> bool:
    return delta.dim() >= 2 and delta.numel() > SMALL


def low_rank_bytes(task: Task, knob: float) -> int:
    """Return the bytes of the files at a rank: of factors of zeros, which need no decomposition."""
    with TemporaryDirectory() as place:
        for name, delta in deltas(task):
            if not factored(delta):
                torch.save(delta, Path(place) / f"{name}_direct.pt")
                continue
            rows, columns = delta.shape[0], delta[0].numel()
            rank = min(int(knob), rows, columns)
            left, right = (torch.zeros(shape, dtype=torch.half) for shape in ((rows, rank), (rank, columns)))
            torch.save({"U": left, "V": right, "shape": delta.shape}, Path(place) / f"{name}.pt")
        return bytes_on_disk(Path(place))


INT8 = Peer("sparse-llm, int8", PACKAGE, write_int8, read_int8)
SPARSE = Peer("sparse-llm, sparse", PACKAGE, write_sparse, read_sparse, 2**-20, 0.1)
LOW_RANK = Peer("sparse-llm, SVD", PACKAGE, write_low_rank, read_low_rank, 1, 256, whole=True, size=low_rank_bytes)
