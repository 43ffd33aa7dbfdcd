"""What learning scales costs on a real encoder: seconds on two threads, and memory above a forward-backward.

    python -m bench.fit_cost --shared ../shared
    python -m bench.fit_cost --table --markdown                      # only show what has been measured

`Learn()` with its defaults for `SeededSign` on MiniLM fine-tuned on SST-2 (22.7M parameters), on 128 training sentences
in batches of 32, against one forward-backward of the whole model on each of the same batches. Every figure is from a
process of its own, and each is taken three times.

Memory is what the kernel counts as resident (VmHWM of /proc/self/status), from a warm start: base, fine-tuned weights
and model are there, and one forward-backward on one sentence has been made. There the peak is reset and the work is
done; the peak less what was resident at the start is its cost. The gradients of all weights are part of the
forward-backward's. Blocks from 64 KiB on are mapped one by one, so that what a tensor gives back is not resident any
more. Seconds are taken without that, of the whole `dtrain.compress`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import dtrain
from bench.cells import parser_for, show, task_of
from bench.memory import reset_peak, resident
from bench.record import Cell, read_results, write_json
from bench.tasks import Task

THREADS, ROUNDS = 2, 3
METHOD = dtrain.SeededSign(keep=1 / 32)
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
HEADER = ("what", "rounds", "figure", "least", "most")


def forward_backward(task: Task) -> None:
    """Run every batch of the unlabelled inputs forward and backward, with the gradients of all weights."""
    task.model.eval()
    for inputs in task.held_out:
        task.model.zero_grad(set_to_none=True)
        logits = task.model(inputs)
        cross_entropy(logits, logits.argmax(-1)).backward()


def learn(task: Task) -> dtrain.Delta:
    return dtrain.compress(task.base, task.tuned, METHOD, fit=dtrain.Learn(), objective=task.objective())


def encode(task: Task) -> dtrain.Delta:
    return dtrain.compress(task.base, task.tuned, METHOD)


WORK: dict[str, Callable[[Task], Any]] = {"forward-backward": forward_backward, "encode": encode, "learn": learn}


def child(name: str, shared: Path) -> None:
    """Do one piece of work and print what it cost."""
    torch.set_num_threads(THREADS)
    task = task_of("sst2", 0, shared)
    task.model.load_state_dict(task.tuned)
    warm_up(task)
    start = resident("VmRSS")
    reset_peak()
    wall, spent = time.perf_counter(), time.process_time()
    result = WORK[name](task)
    seconds = {"seconds": time.process_time() - spent, "wall_seconds": time.perf_counter() - wall}
    fit = result.content.metadata.get("fit") if isinstance(result, dtrain.Delta) else None
    sizes = {"peak_bytes": resident("VmHWM") - start, "start_bytes": start, "model_bytes": model_bytes(task)}
    sys.stdout.write(json.dumps({**seconds, **sizes, "fit": fit}))


def warm_up(task: Task) -> None:
    """Make what a first pass makes once, and give back what is not needed."""
    task.model.eval()
    task.model({key: value[:1] for key, value in task.held_out[0].items()}).sum().backward()
    task.model.zero_grad(set_to_none=True)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def model_bytes(task: Task) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in task.model.state_dict().values())


def measure(name: str, shared: Path, mapped: bool) -> Cell:
    """Return what one fresh process says."""
    command = [sys.executable, "-m", "bench.fit_cost", "--child", name, "--shared", str(shared)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS), **(MAPPED if mapped else {})}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output)


def fill(out: Path, shared: Path, rounds: int) -> None:
    results = read_results(out)
    settings = {"method": METHOD.describe(), "fit": dtrain.Learn().describe(), "threads": THREADS}
    for number in range(rounds):
        for name in WORK:
            for what, mapped in (("memory", True), ("seconds", False)):
                key = f"{name} | {what} | {number}"
                if results["cells"].get(key, {}).get("settings") != settings:
                    results["cells"][key] = {"settings": settings, **measure(name, shared, mapped)}
                    write_json(out, results)
                    sys.stderr.write(f"{key}: {results['cells'][key]}\n")


def rows(cells: dict[str, Cell]) -> list[list[str]]:
    out: list[list[str]] = []
    for name in WORK:
        for what, field, unit, style in (
            ("seconds", "wall_seconds", "wall s", ".1f"),
            ("seconds", "seconds", "processor s", ".1f"),
            ("memory", "peak_bytes", "MB above the start", ".0f"),
        ):
            values = [cell[field] for key, cell in cells.items() if key.startswith(f"{name} | {what} | ")]
            values = [value / 1e6 for value in values] if what == "memory" else values
            if values:
                shown = [format(f(values), style) for f in (median, min, max)]
                out.append([f"{name}, {unit}", str(len(values)), *shown])
    return out


def verdict(cells: dict[str, Cell]) -> str:
    """Return how far the peak of learning is above that of a forward-backward, in models."""

    def peak(name: str) -> float:
        return median(cell["peak_bytes"] for key, cell in cells.items() if key.startswith(f"{name} | memory | "))

    size = next(iter(cells.values()))["model_bytes"]
    above = (peak("learn") - peak("forward-backward")) / size
    return (
        f"MiniLM, {size / 1e6:.1f} MB, {THREADS} threads, medians: the peak of learning is {above:+.2f} models above "
        "that of a forward-backward"
    )


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", choices=WORK)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.shared)
        return
    out = arguments.out or Path("bench/results/fit_cost.json")
    if not arguments.table:
        fill(out, arguments.shared, arguments.rounds)
    cells = read_results(out)["cells"]
    if not cells:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    show(HEADER, rows(cells), verdict(cells), arguments.markdown, left=1)


if __name__ == "__main__":
    main()
