"""What a step of AdamR costs beside torch's AdamW: median step time on a 21.9M-parameter transformer-like model.

Run with `python -m bench.adamr_step [--rounds 15] [--threads 2] [--device cpu]`. The optimizers take turns, round by
round, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import AdamW, Optimizer

from dtrain.optim import AdamR

#: One embedding, two transformer layers of width 768 and their norms and biases.
SHAPES = [(30_000, 256)] + [(768, 768)] * 8 + [(3072, 768), (768, 3072)] * 2 + [(768,)] * 20

Build = Callable[[list[nn.Parameter]], Optimizer]

BASELINE = "AdamW foreach"
CANDIDATES: dict[str, Build] = {
    BASELINE: lambda params: AdamW(params, lr=1e-5, foreach=True),
    "AdamW single tensor": lambda params: AdamW(params, lr=1e-5, foreach=False),
    "AdamW fused": lambda params: AdamW(params, lr=1e-5, fused=True),
    "AdamR l2 stable foreach": lambda params: AdamR(params, lr=1e-5, strength=0.01, foreach=True),
    "AdamR l2 none foreach": lambda params: AdamR(params, lr=1e-5, strength=0.01, normalizer="none", foreach=True),
    "AdamR l1 stable foreach": lambda params: AdamR(params, lr=1e-5, strength=0.01, norm="l1", foreach=True),
    "AdamR l2 stable single tensor": lambda params: AdamR(params, lr=1e-5, strength=0.01, foreach=False),
    "AdamR l2 stable fused": lambda params: AdamR(params, lr=1e-5, strength=0.01, fused=True),
    "AdamR strength 0 foreach": lambda params: AdamR(params, lr=1e-5, strength=0.0, foreach=True),
}


def measure(rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of every timed step, by optimizer; the first two steps of each are warm-up."""
    torch.manual_seed(0)
    steps = {name: _prepare(build, device).step for name, build in CANDIDATES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 2):
        for name, step in steps.items():
            _wait(device)
            start = time.perf_counter()
            step()
            _wait(device)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _prepare(build: Build, device: str) -> Optimizer:
    params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in SHAPES]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-3
    return build(params)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    seconds = measure(args.rounds, args.device)
    millions = sum(torch.Size(shape).numel() for shape in SHAPES) / 1e6
    table = Table(title=f"{millions:.1f}M float32 parameters, {args.device}, {args.threads} threads")
    for header in ("optimizer", "median ms", f"ratio to {BASELINE}"):
        table.add_column(header, justify="left" if header == "optimizer" else "right")
    for name, values in seconds.items():
        # Of the same round: what slows the machine for a while then slows both sides of a ratio.
        ratios = [value / base for value, base in zip(values, seconds[BASELINE], strict=True)]
        table.add_row(name, f"{statistics.median(values) * 1e3:.1f}", f"{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
