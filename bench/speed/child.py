"""One measuring process: contenders take turns, or one of them shows how much memory it takes.

Started by `bench.speed.measure`, which says what to do as JSON and reads the answer from the last line.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.memory import reset_peak, resident
from bench.speed.clock import timed
from bench.speed.contenders import MAIN, METHODS, OPERATIONS, Contender, run
from bench.speed.optimizers import step_turns
from bench.speed.pairs import SIZES, Pair, Size, State, make
from bench.speed.peers import PEERS
from bench.speed.profiles import levels, profile

CONTENDERS = {contender.name: contender for contender in (*MAIN, *METHODS, *PEERS)}
TINY = Size(64, 1, 200)


def turns(pair: Pair, contenders: Sequence[Contender], operation: str, rounds: int) -> dict[str, Any]:
    """Return by contender [seconds, processor seconds] of each step, round by round, and the bytes that it wrote."""
    found: dict[str, Any] = {c.name: {"kind": c.kind, "steps": {}} for c in contenders}
    if operation != "write":
        for contender in contenders:
            run(contender.write(pair))
    for _ in range(rounds):
        for contender in contenders:
            gc.collect()
            for step, seconds in timed(getattr(contender, operation)(pair)):
                found[contender.name]["steps"].setdefault(step, []).append(seconds)
    for contender in contenders:
        found[contender.name]["bytes"] = contender.bytes(pair)
    return found


def memory(pair: Pair, contender: Contender) -> dict[str, dict[str, int]]:
    """Return by operation and step the bytes at its peak beyond what was resident with the models before the first."""
    found: dict[str, dict[str, int]] = {}
    for operation in OPERATIONS:
        _ = pair.base, pair.tuned, operation == "swap" and pair.module
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        start, found[operation] = resident("VmRSS"), {}
        reset_peak()
        for step in getattr(contender, operation)(pair):
            if step is not None:
                found[operation][step] = resident("VmHWM") - start
            reset_peak()
    return found


def rehearse(contenders: Sequence[Contender], dtype: torch.dtype) -> dict[str, bool]:
    """Go through everything once with a tiny model: what is imported or made once is there when it counts.

    Returns:
        By contender, whether it restores the fine-tuned weights bit for bit.
    """
    exact: dict[str, bool] = {}
    with TemporaryDirectory() as folder:
        make(Path(folder), TINY, dtype)
        pair = Pair(Path(folder), Path(folder))
        for contender in contenders:
            run(contender.write(pair))
            state = run(contender.read(pair))
            run(contender.swap(pair))
            if kinds(state) != kinds(pair.base):
                raise ValueError(f"{contender.name} restores something else than the model")
            exact[contender.name] = all(torch.equal(state[name], tensor) for name, tensor in pair.tuned.items())
    return exact


def kinds(state: State) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in state.items()}


def answer(task: dict[str, Any]) -> dict[str, Any]:
    """Do what the task says."""
    torch.set_num_threads(task["threads"])
    if task["operation"] == "step":
        return step_turns(SIZES[task["size"]], task["contenders"], task["rounds"])
    contenders = [CONTENDERS[name] for name in task["contenders"]]
    exact = rehearse(contenders, getattr(torch, task["dtype"]))
    with TemporaryDirectory(dir=task["folder"]) as out:
        pair = Pair(Path(task["folder"]), Path(out))
        if task["operation"] == "profile":
            return {c.name: {what: profile(pair, c, what) for what in OPERATIONS} for c in contenders}
        if task["operation"] == "levels":
            return levels(pair)
        if task["operation"] == "memory":
            return memory(pair, contenders[0])
        found = turns(pair, contenders, task["operation"], task["rounds"])
    return {name: {**row, "exact": exact[name]} for name, row in found.items()}


def main() -> None:
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()):  # some of the tools talk
        found = answer(json.loads(sys.argv[1]))
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
