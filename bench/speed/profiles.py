"""Where the time goes: the functions of dtrain in which its ways spend their processor time."""

from __future__ import annotations

import cProfile
import pstats
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zstandard
from torch import Tensor

import dtrain
from bench.speed.contenders import Contender, run
from bench.speed.pairs import Pair
from dtrain.stages import Bits, Zstd, blocks
from dtrain.stages.bits import as_buffer
from dtrain.weights import tensor_bytes

TOP = 4
LEVELS, OURS = (1, 3, 6, 9), "as written: a block for every plane"
ROOT = Path(dtrain.__file__).parents[1]

Where = tuple[str, int, str]


def profile(pair: Pair, contender: Contender, operation: str) -> dict[str, Any]:
    """Return the processor seconds of one operation, and what share of them dtrain's functions take.

    What a function calls of torch, numpy or Python itself counts as its own.
    """
    profiler = cProfile.Profile(time.process_time)
    profiler.runcall(run, getattr(contender, operation)(pair))
    own = of_dtrain(pstats.Stats(profiler).stats)  # type: ignore[attr-defined]
    whole = own.total()
    return {
        "seconds": round(whole, 3),
        "shares": {name: round(own[name] / whole, 3) for name, _ in own.most_common(TOP)},
    }


def levels(pair: Pair) -> dict[str, dict[str, float]]:
    """Return the bytes and processor seconds of what `Lossless` codes, as it does and at some levels of Zstandard."""
    planes = [(planes_of(pair.base[name], tuned), tuned.itemsize) for name, tuned in pair.tuned.items()]
    codes: dict[str, Callable[[Tensor, int], int]] = {OURS: lambda plane, width: Zstd().encode(plane, 8, width).numel()}
    for level in LEVELS:
        coder = zstandard.ZstdCompressor(level=level)
        codes[str(level)] = lambda plane, _, coder=coder: len(coder.compress(as_buffer(plane)))
    found: dict[str, dict[str, float]] = {}
    for label, code in codes.items():
        start = time.process_time()
        size = sum(code(*plane) for plane in planes)
        found[label] = {"bytes": size, "seconds": round(time.process_time() - start, 3)}
    return found


def planes_of(base: Tensor, tuned: Tensor) -> Tensor:
    changed = tensor_bytes(base) ^ tensor_bytes(tuned)
    return Bits(tuned.itemsize).encode(changed, blocks(0, 0, None)).symbols


def of_dtrain(stats: dict[Where, Any]) -> Counter[str]:
    """Return the seconds of every function of dtrain, with those of foreign functions that it calls."""
    own: Counter[str] = Counter()
    for where, (_, _, seconds, _, callers) in stats.items():
        if name := label(where):
            own[name] += seconds
            continue
        foreign = 0.0
        for caller, (_, _, part, _) in callers.items():
            own[label(caller) or "others"] += part
            foreign += part
        own["others"] += seconds - foreign
    return own


def label(where: Where) -> str | None:
    """Return the module and name of a function of dtrain; None for any other."""
    path = Path(where[0])
    if not path.is_relative_to(ROOT / "dtrain"):
        return None
    return f"{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}.{where[2]}"
