"""Other tools, from their own packages, called as their own code calls them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import zstandard

from bench.speed.contenders import Contender, Steps
from bench.speed.pairs import Pair, State
from bench.versions import VERSIONS
from dtrain.stages.bits import as_buffer
from dtrain.weights import tensor_bytes

FOLDER = Path("runs/peers/speed")
INSTALLED = {name: VERSIONS[name] for name in ("deltatensors", "sparse-llm", "zipnn")}


class DeltaTensors(Contender):
    """`save_delta` and `load_delta`. Those take no bfloat16, so models of it are read from their files, as it offers.

    It gives float32 arrays; here they are tensors of the dtype of the base, at the end.
    """

    def __init__(self, strategy: str) -> None:
        super().__init__(f"deltatensors {strategy}", "peer")
        self.strategy = strategy

    def write(self, pair: Pair) -> Steps[None]:
        import deltatensors

        arguments = {"strategy": self.strategy, "use_gpu": False}
        if pair.halves:
            deltatensors.save_delta_from_paths(
                self.path(pair), pair.file("tuned").parent, pair.file("base").parent, **arguments
            )
        else:
            deltatensors.save_delta(self.path(pair), pair.tuned, pair.base, **arguments)
        yield "compress and save"

    def read(self, pair: Pair) -> Steps[State]:
        import deltatensors

        if pair.halves:
            arrays = deltatensors.load_delta_from_paths(self.path(pair), pair.file("base").parent)
        else:
            arrays = deltatensors.load_delta(self.path(pair), pair.base)
        state = {name: torch.from_numpy(array).to(pair.dtype) for name, array in arrays.items()}
        yield "load and rebuild"
        return state


class SparseLlm(Contender):
    """Eight bits a value, by the functions that its `compress_delta` calls on every tensor.

    That function itself takes causal language models by name only, which `transformers` loads in half precision: this
    part is left out. The files are as it writes them, one for every tensor.
    """

    def __init__(self) -> None:
        super().__init__("sparse-llm int8", "peer")

    def write(self, pair: Pair) -> Steps[None]:
        from core.delta import compress_delta_int8, compute_layer_delta

        folder, scales = self.path(pair), {}
        folder.mkdir(exist_ok=True)
        for name, base in pair.base.items():
            delta, _ = compute_layer_delta(base, pair.tuned[name])
            raw, scales[name], _ = compress_delta_int8(delta.float())  # numpy has no bfloat16
            (folder / f"{name}.bin").write_bytes(raw)
        (folder / "manifest.json").write_text(json.dumps(scales))
        yield "compress and save"

    def read(self, pair: Pair) -> Steps[State]:
        from core.delta import decompress_delta_int8

        folder, state = self.path(pair), {}
        scales = json.loads((folder / "manifest.json").read_text())
        for name, base in pair.base.items():
            raw = (folder / f"{name}.bin").read_bytes()
            state[name] = base + decompress_delta_int8(raw, scales[name], tuple(base.shape), dtype=base.dtype)
        yield "load and rebuild"
        return state


class ZipNN(Contender):
    """Every tensor's bytes by `ZipNN`, with one thread; lossless and without the base."""

    def __init__(self) -> None:
        super().__init__("zipnn", "peer")

    def write(self, pair: Pair) -> Steps[None]:
        from zipnn import ZipNN as Coder

        folder, coder = self.path(pair), Coder(bytearray_dtype=kind(pair.dtype), threads=1)
        folder.mkdir(exist_ok=True)
        for name, tensor in pair.tuned.items():
            (folder / name).write_bytes(coder.compress(bytes(as_buffer(tensor_bytes(tensor)))))
        yield "compress and save"

    def read(self, pair: Pair) -> Steps[State]:
        from zipnn import ZipNN as Coder

        folder, coder, state = self.path(pair), Coder(bytearray_dtype=kind(pair.dtype), threads=1), {}
        for name, tensor in pair.base.items():
            raw = coder.decompress((folder / name).read_bytes())
            state[name] = torch.frombuffer(raw, dtype=pair.dtype).view(tensor.shape)
        yield "load and rebuild"
        return state


class Zstandard(Contender):
    """Every tensor's bytes by Zstandard at its usual level; lossless and without the base."""

    def __init__(self) -> None:
        super().__init__("zstd -3", "peer")

    def write(self, pair: Pair) -> Steps[None]:
        folder, coder = self.path(pair), zstandard.ZstdCompressor(level=3)
        folder.mkdir(exist_ok=True)
        for name, tensor in pair.tuned.items():
            (folder / name).write_bytes(coder.compress(as_buffer(tensor_bytes(tensor))))
        yield "compress and save"

    def read(self, pair: Pair) -> Steps[State]:
        folder, coder, state = self.path(pair), zstandard.ZstdDecompressor(), {}
        for name, tensor in pair.base.items():
            raw = np.frombuffer(coder.decompress((folder / name).read_bytes()), dtype=np.uint8)
            state[name] = torch.from_numpy(raw.copy()).view(pair.dtype).view(tensor.shape)
        yield "load and rebuild"
        return state


def kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


PEERS: tuple[Contender, ...] = (
    DeltaTensors("sparse"),
    DeltaTensors("quantized"),
    DeltaTensors("int4"),
    SparseLlm(),
    ZipNN(),
    Zstandard(),
)
