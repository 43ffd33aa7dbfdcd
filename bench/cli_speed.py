"""What `dtrain compress` and `dtrain apply` cost beside plainly reading the two checkpoints.

Run with `python -m bench.cli_speed [--megabytes 400] [--rounds 3] [--threads 2] [--cold]`. Every measurement is a fresh
process on a synthetic transformer in float32: weights N(0, 0.02), delta N(0, 2e-4).

`read` maps both checkpoints and sums every tensor; `copy` copies one of them and waits until it is on the disk. The
commands also hash the base (SHA-256), and `apply` writes a checkpoint as `copy` does. Work is the time of the command
alone, process includes the start of Python and the imports. Own memory is what the peak of the process's own pages adds
to the imports; resident also counts the imports and the mapped pages of the checkpoints, which the system may drop.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bench.memory import resident

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


def copy() -> None:
    """Copy one file, through to the disk."""
    shutil.copyfile("base.safetensors", "copy.safetensors")
    with Path("copy.safetensors").open("rb") as file:
        os.fsync(file.fileno())


def work(name: str) -> None:
    """Run one of the things that are timed."""
    if name in FLOORS:
        FLOORS[name]()
        return
    from dtrain.cli import main

    with contextlib.redirect_stdout(io.StringIO()):
        code = main([*COMMANDS[name], "--json"])
    if code:
        sys.exit(code)


FLOORS = {"read": read, "copy": copy}


def child(name: str) -> None:
    """Measure one of them in this very process and write the figures as JSON."""
    import safetensors.torch  # noqa: F401 - imports are no part of the work

    import dtrain.cli.commands  # noqa: F401

    with _own_peak() as peak:
        start = time.perf_counter()
        work(name)
        seconds = time.perf_counter() - start
    figures = {"work": seconds, "own": peak[-1] - peak[0], "resident": resident("VmHWM") / 1e6}
    sys.stdout.write(json.dumps(figures))


@contextlib.contextmanager
def _own_peak() -> Iterator[list[float]]:
    """Yield [before, peak] of the process's own memory in MB, looked at every few milliseconds."""
    seen = [resident("RssAnon") / 1e6, 0.0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen[1] = max(seen[1], resident("RssAnon") / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def measure(name: str, folder: Path, rounds: int, threads: int, cold: bool) -> dict[str, float]:
    """Return the least of every figure over several fresh processes."""
    runs: list[dict[str, float]] = []
    command = [sys.executable, "-m", "bench.cli_speed", "--child", name, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    for _ in range(rounds):
        if cold:
            _evict(folder)
        start = time.perf_counter()
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
        runs.append({**json.loads(output), "process": time.perf_counter() - start})
    # The least is what the work costs; anything above it is what else the machine was doing.
    return {key: min(run[key] for run in runs) for key in runs[0]}


def _evict(folder: Path) -> None:
    """Make the system forget what it has cached of the files."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())  # only pages that are on the disk can be dropped
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def report(figures: dict[str, dict[str, float]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for header in ("", "work s", "ratio to read", "process s", "own MB", "resident MB"):
        table.add_column(header, justify="right" if header else "left")
    floor = figures["read"]["work"]
    for name, row in figures.items():
        seconds = (f"{row['work']:.2f}", f"{row['work'] / floor:.2f}", f"{row['process']:.2f}")
        table.add_row(name, *seconds, f"{row['own']:.0f}", f"{row['resident']:.0f}")
    Console(width=110).print(title, table, sep="\n", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cold", action="store_true", help="drop the files from the page cache before every run")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        with contextlib.chdir(args.folder):
            child(args.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_pair(Path(folder), args.megabytes)
        figures = {n: measure(n, Path(folder), args.rounds, args.threads, args.cold) for n in (*FLOORS, *COMMANDS)}
        where = "from the disk" if args.cold else "from the page cache"
        report(figures, f"two checkpoints of {args.megabytes} MB {where}, Dare(keep=0.01), {args.threads} threads")


if __name__ == "__main__":
    main()
