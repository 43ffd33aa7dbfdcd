"""A model before and after fine-tuning, made up: shapes of an encoder, and a delta as fine-tuning leaves it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

#: Of the weights, such that in bfloat16 a delta of this size rounds to nothing at 38 % of them, as a fine-tune's does.
WEIGHTS, DELTA = 0.122, 5e-4
State = dict[str, Tensor]


class Size(NamedTuple):
    """The shape of an encoder."""

    width: int
    layers: int
    vocabulary: int


SIZES = {
    "20M": Size(384, 9, 10_000),
    "100M": Size(768, 11, 30_522),
    "300M": Size(1024, 21, 30_522),
    "1B": Size(2048, 19, 30_522),
}


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an encoder's tensors, named as BERT's are."""
    width = size.width
    found: dict[str, tuple[int, ...]] = {"embeddings.word_embeddings.weight": (size.vocabulary, width)}
    for i in range(size.layers):
        parts = {f"attention.self.{part}": (width, width) for part in ("query", "key", "value")}
        parts |= {"attention.output.dense": (width, width)}
        parts |= {"intermediate.dense": (4 * width, width), "output.dense": (width, 4 * width)}
        for part, shape in parts.items():
            found[f"encoder.layer.{i}.{part}.weight"] = shape
            found[f"encoder.layer.{i}.{part}.bias"] = shape[:1]
        for place in ("attention.output", "output"):
            found |= {f"encoder.layer.{i}.{place}.LayerNorm.{part}": (width,) for part in ("weight", "bias")}
    return found


def make(folder: Path, size: Size, dtype: torch.dtype, seed: int = 0) -> None:
    """Write `base/model.safetensors` and `tuned/model.safetensors`."""
    random = torch.Generator().manual_seed(seed)
    base = {name: (torch.randn(s, generator=random) * WEIGHTS).to(dtype) for name, s in shapes(size).items()}
    tuned = {n: (t.float() + torch.randn(t.shape, generator=random) * DELTA).to(dtype) for n, t in base.items()}
    for name, state in (("base", base), ("tuned", tuned)):
        (folder / name).mkdir(parents=True)
        save_file(state, folder / name / "model.safetensors")


class Pair:
    """The two models, read when they are asked for, and where the compressed ones go.

    Args:
        folder: What `make` wrote to.
        out: An empty folder.
    """

    def __init__(self, folder: Path, out: Path) -> None:
        self.folder, self.out = folder, out

    @cached_property
    def dtype(self) -> torch.dtype:
        return next(iter(self.base.values())).dtype

    @property
    def halves(self) -> bool:
        """Whether the weights are bfloat16, which numpy does not know."""
        return self.dtype == torch.bfloat16

    @cached_property
    def base(self) -> State:
        return self._read("base")

    @cached_property
    def tuned(self) -> State:
        return self._read("tuned")

    @cached_property
    def module(self) -> nn.Module:
        """A module that holds the base in memory of its own."""
        return module_of({name: tensor.clone() for name, tensor in self.base.items()})

    def file(self, which: str) -> Path:
        return self.folder / which / "model.safetensors"

    def _read(self, which: str) -> State:
        return {name: tensor.clone() for name, tensor in load_file(self.file(which)).items()}  # not mapped: in memory


def module_of(state: State) -> nn.Module:
    """Return a module with these parameters."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, nn.Parameter(tensor, requires_grad=False))
    return root
