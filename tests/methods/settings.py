"""One table of methods with what is expected of each, and one zoo of tensors: they feed every generic test."""

from typing import NamedTuple

import torch
from torch import nn

import dtrain
from dtrain import Dare, DareX, Lossless, Method, Rules
from dtrain.artifact import pack_file

HALF = 2**-11
RULES = Rules(whole=("head.*",), drop=("dropped",))


class Setting(NamedTuple):
    """A method and what it promises.

    Args:
        id: Name of the test case.
        method: The method.
        unbiased: Whether the mean over seeds is the delta.
        error: Greatest error of one kept value, as a share of the value; None where the format promises less.
    """

    id: str
    method: Method
    unbiased: bool = False
    error: float | None = None


SETTINGS = [
    Setting("dare", Dare(keep=0.1), True, HALF),
    Setting("dare nearly all", Dare(keep=0.9, seed=2**64 - 1), True, HALF),
    Setting("dare stratified", Dare(keep=0.25, mask="stratified"), True, HALF),
    Setting("dare stratified above half", Dare(keep=0.75, mask="stratified"), True, HALF),
    Setting("dare bfloat16", Dare(keep=0.3, values="bfloat16"), True, 2**-8),
    Setting("dare uniform8", Dare(keep=0.3, values="uniform8")),
    Setting("dare uniform4", Dare(keep=0.3, values="uniform4")),
    Setting("dare uniform2", Dare(keep=0.3, values="uniform2")),
    Setting("dare sign", Dare(keep=0.3, values="sign")),
    Setting("all", Dare(keep=1), error=HALF),
    Setting("darex", DareX(keep=0.1, q=0.3), error=HALF),
    Setting("darex norm", DareX(keep=0.1, q="norm"), error=HALF),
    Setting("darex norm sign", DareX(keep=0.1, q="norm", values="sign", mask="stratified")),
    Setting("lossless", Lossless(), error=0.0),
]
LOSSY = [setting for setting in SETTINGS if not setting.method.bitwise]


def _change(value: torch.Tensor) -> torch.Tensor:
    return value + (0.01 * torch.randn(value.shape)).to(value.dtype)


def zoo() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return a base and its fine-tune with every shape, layout and dtype that tends to break things."""
    torch.manual_seed(5)
    base = {
        "matrix": torch.randn(24, 16),
        "row": torch.randn(1, 70),
        "cube": torch.randn(3, 5, 7),
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.last": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last),
        "scalar": torch.randn(()),
        "one": torch.randn(1, 1),
        "empty": torch.empty(0, 5),
        "vector": torch.randn(16),
        "transposed": torch.randn(8, 6).t(),
        "sliced": torch.randn(9, 10)[::2, 1:6],
        "bf16": torch.randn(9, 7).bfloat16(),
        "fp16": torch.randn(9, 7).half(),
        "fp64": torch.randn(9, 7, dtype=torch.float64),
        "größe/x": torch.randn(5, 3),
        "frozen": torch.randn(4, 4),
        "dropped": torch.randn(4, 4),
        "tied.a": torch.randn(6, 5),
    }
    tuned = {name: _change(value) for name, value in base.items()}
    tuned["frozen"] = base["frozen"].clone()
    tuned["transposed"] = _change(base["transposed"].t()).t()
    for state in (base, tuned):
        state["tied.b"] = state["tied.a"]
    whole = {"steps": torch.tensor(3), "table": torch.arange(6, dtype=torch.int32), "bytes": torch.arange(9).byte()}
    base |= {**whole, "mask": torch.tensor([True, False, True])}
    tuned |= {name: value + 1 for name, value in whole.items()} | {"mask": torch.tensor([True, True, False])}
    base["pooler"] = torch.randn(2, 2)
    tuned["head.weight"], tuned["head.bias"] = torch.randn(3, 16), torch.randn(3)
    return base, tuned


def compress_zoo(method: Method) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dtrain.Delta]:
    """Return the zoo's base, its fine-tune, and the delta between them."""
    base, tuned = zoo()
    return base, tuned, dtrain.compress(base, tuned, method, rules=RULES)


def tiny(method: Method | None = None) -> tuple[dict[str, torch.Tensor], dtrain.Delta]:
    """Return the smallest base with a matrix, a vector and a fresh head, and a delta on it."""
    base = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4)}
    tuned = {name: value + torch.randn(value.shape) for name, value in base.items()}
    tuned["head.weight"] = torch.randn(2, 2)
    return base, dtrain.compress(base, tuned, method or Dare(keep=0.5))


def bytes_of(delta: dtrain.Delta) -> bytearray:
    """Return the bytes of the delta's file."""
    return bytearray(b"".join(pack_file(delta.content)))


def module_of(state: dict[str, torch.Tensor]) -> nn.Module:
    """Return a module with exactly these names, memory layouts and ties."""
    root, known = nn.Module(), {}
    for name, value in state.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            owner = owner._modules[part]
        if not value.is_floating_point():
            owner.register_buffer(leaf, value.clone())
            continue
        if id(value) not in known:
            fresh = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype).copy_(value)
            known[id(value)] = nn.Parameter(fresh)
        owner.register_parameter(leaf, known[id(value)])
    return root


def raw(tensor: torch.Tensor) -> bytes:
    """Return the tensor's bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts agree in names, dtypes, shapes and every bit."""
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b)) for a, b in ((first[k], second[k]) for k in first)
    )
