"""What `dtrain compress` and `dtrain apply` cost beside plainly reading the two checkpoints.

Run with `python -m bench.cli_speed [--megabytes 400] [--rounds 3] [--threads 2]`. Every measurement is a fresh process on a synthetic
transformer in float32: weights N(0, 0.02), delta N(0, 2e-4). Both files are in the page cache. `work` is the time of
the command alone, `process` includes the start of Python and the imports; `anonymous` is the peak of the memory that
is the process's own, `resident` also counts mapped pages of the checkpoints, which the system may drop at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

WIDTH = 1024
COMMANDS = {
    "compress": ["compress", "base.safetensors", "tuned.safetensors", "delta.safetensors", "--method.keep", "0.01"],
    "verify": ["verify", "base.safetensors", "delta.safetensors"],
    "apply": ["apply", "base.safetensors", "delta.safetensors", "merged.safetensors"],
}


def make_pair(folder: Path, megabytes: int) -> None:
    """Write base and fine-tuned model: embeddings a fifth, the rest transformer blocks with norms and biases."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    elements = megabytes * 1_000_000 // 4
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (elements // 5 // WIDTH, WIDTH)}
    left = elements - elements // 5
    for layer in range(max(1, left // (12 * WIDTH * WIDTH))):
        prefix = f"layers.{layer}"
        shapes |= {f"{prefix}.attention.{name}.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{prefix}.up.weight": (4 * WIDTH, WIDTH), f"{prefix}.down.weight": (WIDTH, 4 * WIDTH)}
        shapes |= {f"{prefix}.norm.{name}": (WIDTH,) for name in ("weight", "bias")}
    base = {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}
    save_file(base, folder / "base.safetensors")
    save_file({n: t + torch.randn_like(t) * 2e-4 for n, t in base.items()}, folder / "tuned.safetensors")


def read() -> None:
    """Load both files and touch every byte."""
    from safetensors.torch import load_file

    for name in ("base.safetensors", "tuned.safetensors"):
        for tensor in load_file(name).values():
            tensor.sum()


def work(name: str) -> None:
    """Run one of the things that are timed."""
    if name == "read":
        read()
        return
    from dtrain.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        code = main([*COMMANDS[name], "--json"])
    if code:
        sys.exit(code)


def child(name: str) -> None:
    """Measure one of them in this very process and write the figures as JSON."""
    import safetensors.torch  # noqa: F401 - imports are no part of the work

    import dtrain.cli.commands  # noqa: F401

    with _anonymous_peak() as peak:
        start = time.perf_counter()
        work(name)
        seconds = time.perf_counter() - start
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    sys.stdout.write(json.dumps({"work": seconds, "anonymous": peak[-1] - peak[0], "resident": resident}))


@contextlib.contextmanager
def _anonymous_peak() -> Iterator[list[float]]:
    """Yield [before, peak] of the process's own memory in MB, looked at every few milliseconds."""
    seen = [_anonymous(), 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[1] = max(seen[1], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _anonymous() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1000
    return 0.0


def measure(name: str, folder: Path, rounds: int, threads: int) -> dict[str, float]:
    """Return the least of every figure over several fresh processes."""
    runs: list[dict[str, float]] = []
    command = [sys.executable, "-m", "bench.cli_speed", "--child", name, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for _ in range(rounds):
        start = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        runs.append({**json.loads(output), "process": time.perf_counter() - start})
    # The least is what the work costs; anything above it is what else the machine was doing.
    return {key: min(run[key] for run in runs) for key in runs[0]}


def report(figures: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for header in ("", "work s", "ratio to read", "process s", "anonymous MB", "resident MB"):
        table.add_column(header, justify="right" if header else "left")
    floor = figures["read"]["work"]
    for name, row in figures.items():
        seconds = (f"{row['work']:.2f}", f"{row['work'] / floor:.2f}", f"{row['process']:.2f}")
        table.add_row(name, *seconds, f"{row['anonymous']:.0f}", f"{row['resident']:.0f}")
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with contextlib.chdir(args.folder):
            child(args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), args.megabytes)
        figures = {name: measure(name, Path(folder), args.rounds, args.threads) for name in ("read", *COMMANDS)}
        report(figures, f"two checkpoints of {args.megabytes} MB, Dare(keep=0.01), {args.threads} threads")


if __name__ == "__main__":
    main()
