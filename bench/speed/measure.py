"""Cells: which there are, and the processes that measure them."""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.record import Job
from bench.speed.contenders import MAIN, METHODS, OPERATIONS
from bench.speed.optimizers import BUILD
from bench.speed.pairs import SIZES, make, shapes
from bench.speed.peers import FOLDER, INSTALLED, PEERS

MODELS = Path("runs/bench/speed")
ROUNDS = {"20M": 5, "100M": 3, "300M": 2, "1B": 1}  # the larger, the less another process can disturb
#: Left out where a round would take minutes; how they grow is seen up to 300M.
SLOW = ("dtrain Lossless", "torch.save", "deltatensors sparse", "sparse-llm int8", "zstd -3")
#: Optimizers by size: all their states are there at once.
OPTIMIZERS = {"20M": tuple(BUILD), "100M": tuple(BUILD)[:6]}
#: Blocks from 64 KiB on are mapped one by one, so that what a tensor gives back is not resident any more.
MAPPED = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def jobs(dtype: str, size: str, threads: int = 1, peers: bool = True, most: int = 5) -> Iterator[Job]:
    """Yield the cells of one pair of models: time by operation, all in turn, and memory by contender.

    Args:
        dtype: Of both models.
        size: Of both models.
        threads: Of a measuring process.
        peers: Whether other tools take part.
        most: The most rounds there may be.
    """
    rounds = min(most, ROUNDS[size])
    taking_part = [c for c in (*MAIN, *(PEERS if peers else ())) if size != "1B" or c.name not in SLOW]
    names = [contender.name for contender in taking_part]
    cell = partial(job, dtype=dtype, size=size, threads=threads)
    for operation in OPERATIONS:
        yield cell(operation, operation, names, rounds=rounds)
    if size == "20M":
        yield cell("levels", "levels", [], rounds=1)
    if dtype == "float32":
        yield cell("step", "step", OPTIMIZERS[size], rounds=3 * rounds)
        return
    if size == "20M":
        others = [c.name for c in (MAIN[0], *METHODS)]
        for operation in OPERATIONS[:2]:
            yield cell(f"{operation} | other methods", operation, others, rounds=min(rounds, 3))
        ours = [c.name for c in (*MAIN, *METHODS) if c.kind == "dtrain"]
        yield cell("profile", "profile", ours, rounds=1)
    for contender in taking_part:
        if contender.kind != "floor":
            yield cell(f"memory | {contender.name}", "memory", [contender.name], rounds=1)


def job(
    key: str, operation: str, contenders: Sequence[str], *, dtype: str, size: str, threads: int, rounds: int
) -> Job:
    settings = {
        "dtype": dtype,
        "size": size,
        "threads": threads,
        "operation": operation,
        "contenders": list(contenders),
        "rounds": rounds,
        "peers": INSTALLED,
    }

    def measure() -> dict[str, Any]:
        found = ask(settings, models(dtype, size))
        return {"machine": machine(), "checkpoint_bytes": checkpoint_bytes(dtype, size), "found": found}

    return Job(key, settings, measure)


def ask(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return what a fresh process says."""
    task = {**settings, "folder": str(folder)}
    threads = {f"{name}_NUM_THREADS": str(settings["threads"]) for name in ("OMP", "MKL", "OPENBLAS", "RAYON")}
    path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(FOLDER.resolve())])
    environment = {**os.environ, **threads, "PYTHONPATH": path, **(MAPPED if settings["operation"] == "memory" else {})}
    command = [sys.executable, "-m", "bench.speed.child", json.dumps(task)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output)


def models(dtype: str, size: str) -> Path:
    """Return the folder of a pair of models, which is made where it is not there yet."""
    folder = MODELS / f"{dtype}-{size}"
    if not folder.exists():
        new = folder.with_suffix(".new")
        shutil.rmtree(new, ignore_errors=True)
        make(new, SIZES[size], getattr(torch, dtype))
        new.rename(folder)
    return folder


def checkpoint_bytes(dtype: str, size: str) -> int:
    return sum(math.prod(shape) for shape in shapes(SIZES[size]).values()) * getattr(torch, dtype).itemsize


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code, and nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
