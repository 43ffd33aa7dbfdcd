"""One table of methods with what is expected of each, and one zoo of tensors: they feed every generic test."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

import dtrain
from dtrain import (
    BitDelta,
    Calibration,
    ComPEFT,
    Dare,
    DareX,
    Dbms,
    DeltaCoMe,
    DeltaDCT,
    DeltaDQ,
    Ecsq,
    EoRA,
    ImPart,
    Inputs,
    Lossless,
    Magnitude,
    Method,
    Rules,
    SeededSign,
    Structured,
    UltraDelta,
    Wanda,
)
from dtrain.artifact import pack_file
from dtrain.stages import Payload, decode

HALF = 2**-11
RULES = Rules(whole=("head.*",), drop=("dropped",))
UNSEEN = ("sliced", "größe/x")  # matrices that the calibration multiplies by nothing


class Setting(NamedTuple):
    """A method and what it promises.

    Args:
        id: Name of the test case.
        method: The method.
        full: The same at its finest, where it is to recover the delta; None where it cannot.
        error: Greatest error of one element of `full`, as a share of the greatest change.
        unbiased: Whether the mean over seeds is the delta.
        exact: Whether any two readers agree in every bit; else to the last place.
    """

    id: str
    method: Method
    full: Method | None = None
    error: float = HALF
    unbiased: bool = False
    exact: bool = True


def _random(method: Method) -> list[Setting]:
    """Return the rows of a method that takes `values`, at every format."""
    errors = {"float16": HALF, "bfloat16": 2**-8, "uniform8": 0.5 / 127, "uniform4": 0.5 / 7, "uniform2": 0.5}
    all_of = {"keep": 1, **({"q": 1.0} if isinstance(method, DareX) else {})}
    rows = [
        Setting(f"{type(method).__name__} {values}", replace(method, values=values), None, error)
        for values, error in errors.items()
    ]
    sign = Setting(f"{type(method).__name__} sign", replace(method, values="sign"))
    return [row._replace(full=replace(row.method, **all_of)) for row in rows] + [sign]


SETTINGS = [
    *_random(Dare(keep=0.3)),
    *_random(Magnitude(keep=0.3)),
    Setting("Dare", Dare(keep=0.1), Dare(keep=1), unbiased=True),
    Setting("Dare nearly all", Dare(keep=0.9, seed=2**64 - 1), unbiased=True),
    Setting("Dare stratified", Dare(keep=0.25, mask="stratified"), unbiased=True),
    Setting("Dare stratified above half", Dare(keep=0.75, mask="stratified"), unbiased=True),
    Setting("Dare all", Dare(keep=1)),
    Setting("DareX", DareX(keep=0.1, q=0.3), DareX(keep=1, q=1.0)),
    Setting("DareX keep", DareX(keep=0.2, q="keep", scope="layer", search="golden"), unbiased=True),
    Setting("DareX norm", DareX(keep=0.1, q="norm"), DareX(keep=1, q="norm")),
    Setting("DareX norm sign", DareX(keep=0.1, q="norm", values="sign", mask="stratified")),
    Setting("DareX bound", DareX(keep=0.2, q="bound", eta=0.5), DareX(keep=1, q="bound")),
    Setting("DareX bound signed", DareX(keep=0.2, q="bound", signed=True, values="uniform8")),
    Setting("Structured columns", Structured(keep=0.5, q="keep"), Structured(keep=1, q="keep"), unbiased=True),
    Setting("Structured rows", Structured(keep=0.5, q=0.7, unit="row", values="uniform4")),
    Setting("Structured blocks", Structured(keep=0.3, q="keep", unit="block", block=3), unbiased=True),
    Setting("Magnitude norm", Magnitude(keep=0.05, rescale="norm"), Magnitude(keep=1, rescale="norm")),
    Setting("Wanda", Wanda(keep=0.3), Wanda(keep=1)),
    Setting("Wanda uniform4", Wanda(keep=0.5, values="uniform4"), Wanda(keep=1, values="uniform4"), 0.5 / 7),
    Setting("DeltaDQ", DeltaDQ(), DeltaDQ(alpha=1, bits=16), 2**-15),
    Setting("DeltaDQ rows", DeltaDQ(alpha=4, group="row", bits=8, scope="row"), DeltaDQ(alpha=1, bits=8), 2**-8),
    Setting("DeltaDQ groups", DeltaDQ(alpha=3, group=12, bits=16, parts=1, scope=5), unbiased=True),
    Setting("DeltaDQ parts only", DeltaDQ(alpha=2, bits=3, parts=8, seed=7)),
    Setting("DeltaDQ all", DeltaDQ(alpha=1, bits=1, parts=2)),
    Setting("DeltaDQ search", DeltaDQ(alpha=4, group="search", bits=6)),
    Setting("DeltaDCT", DeltaDCT(), DeltaDCT(bits=[8], shares=[1]), 2**-5, exact=False),
    Setting("DeltaDCT four classes", DeltaDCT(4, (5, 3, 1, 0), (0.1, 0.2, 0.3, 0.4), "zero", False), exact=False),
    Setting("BitDelta", BitDelta()),
    Setting("BitDelta rows", BitDelta("row")),
    Setting("BitDelta columns", BitDelta("column")),
    Setting("ComPEFT", ComPEFT(keep=0.2)),
    Setting("ComPEFT tensors", ComPEFT(keep=0.05, alpha=2.0, scope="tensor")),
    Setting("ComPEFT all", ComPEFT(keep=1)),
    Setting("DeltaCoMe", DeltaCoMe(), DeltaCoMe([16], [], 99, 16), 2**-8, exact=False),
    Setting("DeltaCoMe bands", DeltaCoMe([4, 2], [1], 3.0, 32), exact=False),
    Setting("DeltaCoMe GPTQ", DeltaCoMe([8, 4], [1], 2.0, 16, gptq=True), exact=False),
    Setting("ImPart", ImPart(keep=0.5), ImPart(keep=2), 2**-9, exact=False),
    Setting("ImPart tail", ImPart(keep=1, beta=0.4, values="uniform8", seed=2**64 - 1), exact=False),
    Setting("UltraDelta", UltraDelta(keep=0.3), UltraDelta(keep=1, step=0, bits=12, gamma=1), 2**-12),
    Setting("UltraDelta fine", UltraDelta(keep=0.3, bits=12, gamma=1), None, 2**-12, unbiased=True),
    Setting("UltraDelta plain", UltraDelta(keep=0.8, step=0.5, bits=2, gamma=1.0, seed=3)),
    Setting("EoRA", EoRA(), EoRA(rank=99, values="float16"), 2**-8, exact=False),
    Setting("EoRA plain", EoRA(BitDelta("row"), 2, weighted=False), exact=False),
    Setting("EoRA on a search", EoRA(DeltaDQ(alpha=4, group="search"), 1, "sign"), exact=False),
    Setting("EoRA on a plan", EoRA(ComPEFT(), 3, "bfloat16"), exact=False),
    Setting("Ecsq", Ecsq(), Ecsq(bits=8), 2**-6),
    Setting("Ecsq small", Ecsq(bits=0.1)),
    Setting("SeededSign", SeededSign(keep=0.25)),
    Setting("SeededSign norm", SeededSign(keep=0.6, q="norm", seed=9)),
    Setting("SeededSign parallel", SeededSign(keep=0.25, q="parallel")),
    Setting("DareX parallel", DareX(keep=0.1, q="parallel"), DareX(keep=1, q="parallel")),
    Setting("Dbms", Dbms(SeededSign(keep=0.5), lam=0.7, eta=1.0)),
    Setting("Dbms values", Dbms(Dare(keep=0.5), lam=0.5, eta=1.0), Dbms(Dare(keep=1), "own", None, 0.5, 1.0), 2 * HALF),
    Setting("Dbms signs", Dbms(BitDelta(), split=None, lam=1.25, eta=0.9)),
    Setting("Dbms on a plan", Dbms(Ecsq(bits=1.0), split=0.25, lam=1.0, eta=1.0)),
    Setting("Lossless", Lossless(), Lossless(), 0.0),
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
        "attn.query.weight": torch.randn(8, 18),
        "attn.key.weight": torch.randn(8, 18),
        "attn.key.bias": torch.randn(8),
        "conv1d": torch.randn(18, 8),
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


def inputs(step: int, *shape: int) -> torch.Tensor:
    """Return what a layer sees: it hangs on nothing but the step and the shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(step))


def look(module: nn.Module, step: int) -> None:
    """Multiply nearly all matrices by inputs: one as Hugging Face's `Conv1D` does, one as a convolution."""
    for name, weight in module.named_parameters():
        if weight.ndim == 2 and weight.numel() and name not in UNSEEN:
            if name == "conv1d":
                torch.addmm(torch.zeros(8), inputs(step, 30, 18), weight)
            else:
                functional.linear(inputs(step, 30, weight.shape[1]).to(weight.dtype), weight)
    functional.conv2d(inputs(step, 2, 3, 5, 5), module.conv.weight)


def calibration_of(state: dict[str, torch.Tensor]) -> Calibration:
    """Return a calibration that sees most matrices of a model with this state."""
    return Calibration(module_of(state), [0, 1], look)


def compress_zoo(method: Method) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dtrain.Delta]:
    """Return the zoo's base, its fine-tune, and the delta between them."""
    base, tuned = zoo()
    return base, tuned, dtrain.compress(base, tuned, method, calibration=calibration_of(tuned), rules=RULES)


def dense(payloads: Sequence[Payload], shape: Sequence[int], name: str = "w") -> torch.Tensor:
    """Return the sum of scale * decode(payload), float64."""
    total = torch.zeros(math.prod(shape), dtype=torch.float64)
    for payload in payloads:
        total += decode(payload, name, shape).dense(total.numel()).double() * payload.scale
    return total.view(shape)


def rebuilt(method: Method, delta: torch.Tensor, inputs: Inputs | None = None) -> torch.Tensor:
    """Return what is left of one tensor's delta after encoding and decoding, float64."""
    return dense(method.encode("w", delta, inputs), delta.shape)


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
    flat = tensor.detach().clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Return whether two state dicts agree in names, dtypes, shapes and every bit."""
    return first.keys() == second.keys() and all(
        (a.dtype, a.shape, raw(a)) == (b.dtype, b.shape, raw(b)) for a, b in ((first[k], second[k]) for k in first)
    )
