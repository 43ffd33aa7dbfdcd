"""What is compared: dtrain, and what nothing that moves the weights can be faster than. Other tools are in `peers`.

Everything that a contender does is a generator: a `yield` ends what came before it and says what that was, or None
where it does not count. So all take turns, and no clock is among what is measured.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Generator
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import load_file, save_file

import dtrain
from bench.speed.pairs import Pair, State
from dtrain.stages.bits import as_buffer
from dtrain.weights import tensor_bytes

T = TypeVar("T")
Steps = Generator[str | None, None, T]
Kind = Literal["floor", "dtrain", "peer"]
OPERATIONS = ("write", "read", "swap")
#: By default the token embeddings of an encoder stay at the base; other tools treat every tensor, and so do we here.
RULES = dtrain.Rules(embeddings=())


class Contender(ABC):
    """Something that gets fine-tuned weights to a disk and back. A subclass has at least `write` and `read`.

    Args:
        name: What it is called.
        kind: What it is.
    """

    def __init__(self, name: str, kind: Kind) -> None:
        self.name, self.kind = name, kind

    def path(self, pair: Pair) -> Path:
        """Return the file or folder that it writes to."""
        return pair.out / "".join(char if char.isalnum() else "_" for char in self.name)

    @abstractmethod
    def write(self, pair: Pair) -> Steps[None]:
        """Bring what fine-tuning made, or changed, from memory to the disk."""

    @abstractmethod
    def read(self, pair: Pair) -> Steps[State]:
        """Return the fine-tuned weights, in memory of their own, from the disk and the base in memory."""

    def swap(self, pair: Pair) -> Steps[None]:
        """Put the fine-tuned weights into a live module, and then the base's again."""
        yield None
        pair.module.load_state_dict(run(self.read(pair)))
        yield "apply"
        pair.module.load_state_dict(pair.base)
        yield "remove"

    def bytes(self, pair: Pair) -> int:
        """Return the size of what it wrote."""
        path = self.path(pair)
        return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size


def run(steps: Steps[T]) -> T:
    """Take all steps and return what comes out."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class Ours(Contender):
    """dtrain with one of its methods."""

    def __init__(self, method: dtrain.Method, label: str = "") -> None:
        super().__init__(f"dtrain {label or type(method).__name__}", "dtrain")
        self.method = method

    def write(self, pair: Pair) -> Steps[None]:
        delta = dtrain.compress(pair.base, pair.tuned, self.method, rules=RULES)
        yield "compress"
        delta.save(self.path(pair))
        yield "save"

    def read(self, pair: Pair) -> Steps[State]:
        delta = dtrain.load(self.path(pair))
        yield "load"
        state = delta.state_dict(pair.base)
        yield "rebuild"
        return state

    def swap(self, pair: Pair) -> Steps[None]:
        delta = dtrain.load(self.path(pair))
        delta.apply_(pair.module)
        yield "apply"
        delta.remove_(pair.module)
        yield "remove"


class MemoryCopy(Contender):
    """Every tensor copied once, from memory to memory."""

    def __init__(self) -> None:
        super().__init__("memory copy", "floor")

    def write(self, pair: Pair) -> Steps[None]:
        run(self.read(pair))
        yield "copy"

    def read(self, pair: Pair) -> Steps[State]:
        state = {name: tensor.clone() for name, tensor in pair.tuned.items()}
        yield "copy"
        return state

    def swap(self, pair: Pair) -> Steps[None]:
        yield None
        pair.module.load_state_dict(pair.tuned)
        yield "apply"
        pair.module.load_state_dict(pair.base)
        yield "remove"

    def bytes(self, pair: Pair) -> int:
        return sum(tensor.nbytes for tensor in pair.tuned.values())


class FileCopy(Contender):
    """The bytes of the checkpoint in one file; like dtrain's, it is on the disk before writing returns."""

    def __init__(self) -> None:
        super().__init__("plain file", "floor")

    def write(self, pair: Pair) -> Steps[None]:
        with self.path(pair).open("wb") as file:
            for tensor in pair.tuned.values():
                file.write(as_buffer(tensor_bytes(tensor)))
            file.flush()
            os.fsync(file.fileno())
        yield "write"

    def read(self, pair: Pair) -> Steps[State]:
        state = {name: torch.empty_like(tensor) for name, tensor in pair.base.items()}
        with self.path(pair).open("rb", buffering=0) as file:
            for tensor in state.values():
                file.readinto(as_buffer(tensor_bytes(tensor)))
        yield "read"
        return state


class Safetensors(Contender):
    """`save_file` and `load_file`, whose lazily mapped tensors are copied; nothing is synced to the disk."""

    def __init__(self) -> None:
        super().__init__("safetensors", "peer")

    def write(self, pair: Pair) -> Steps[None]:
        save_file(pair.tuned, self.path(pair))
        yield "save"

    def read(self, pair: Pair) -> Steps[State]:
        state = {name: tensor.clone() for name, tensor in load_file(self.path(pair)).items()}
        yield "load"
        return state


class TorchSave(Contender):
    """`torch.save` and `torch.load`; nothing is synced to the disk."""

    def __init__(self) -> None:
        super().__init__("torch.save", "peer")

    def write(self, pair: Pair) -> Steps[None]:
        torch.save(pair.tuned, self.path(pair))
        yield "save"

    def read(self, pair: Pair) -> Steps[State]:
        state = torch.load(self.path(pair), weights_only=True)
        yield "load"
        return state


#: What is measured at every size: one method per kind of payload.
MAIN: tuple[Contender, ...] = (
    MemoryCopy(),
    FileCopy(),
    Ours(dtrain.SeededSign(keep=1 / 32, q="keep")),
    Ours(dtrain.DareX(keep=0.1, q="norm")),
    Ours(dtrain.BitDelta()),
    Ours(dtrain.Lossless()),
    Safetensors(),
    TorchSave(),
)
#: The other methods that need no data, with their default arguments.
METHODS: tuple[Contender, ...] = tuple(
    Ours(method)
    for method in (
        dtrain.Dare(),
        dtrain.Structured(q="norm"),
        dtrain.Magnitude(),
        dtrain.DeltaDQ(),
        dtrain.DeltaDCT(),
        dtrain.ComPEFT(),
        dtrain.DeltaCoMe(),
        dtrain.ImPart(),
        dtrain.UltraDelta(),
        dtrain.Ecsq(),
    )
)
