"""AdamR on against off: how large the delta gets, how good the fine-tuned model is, and what survives compression.

    python -m bench.adamr_cifar --model ../shared/models/vit-cifar --data ../shared/data/cifar10

The model and data of `recipes/vit_cifar.py` with the paper-exact optimizer `dtrain.AdamR` on all matrices; the rest is
trained by the same optimizer with strength 0. One JSON cell per (seed, strength); it picks up where it stopped. q is
searched on training images that are held out of training; the test split is only scored. Norms and biases are kept in
half precision and the head as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import dtrain
from bench.presets import RULES
from bench.tasks import accuracy, snapshot
from bench.tasks.vision import CIFAR_CLASSES, fine_tune_images, plain_images, vision_model
from parts.images import Images

KEEP = 0.01


def optimizer_for(model: nn.Module, strength: float, lr: float) -> dtrain.AdamR:
    rules = dtrain.Rules()
    pulled, free = [], []
    for name, parameter in model.named_parameters():
        (pulled if rules.role(name, parameter.shape, parameter.dtype) == "method" else free).append(parameter)
    return dtrain.AdamR([{"params": pulled, "strength": strength}, {"params": free, "strength": 0.0}], lr, strength=0.0)


def delta_norm(base: dict[str, Tensor], tuned: dict[str, Tensor]) -> float:
    rules = dtrain.Rules()
    names = [name for name in base if rules.role(name, base[name].shape, base[name].dtype) == "method"]
    change = sum(float((tuned[name] - base[name]).double().square().sum()) for name in names)
    return math.sqrt(change / sum(float(base[name].double().square().sum()) for name in names))


def cell(arguments: argparse.Namespace, seed: int, strength: float) -> dict[str, float]:
    data = Images(arguments.data, classes=CIFAR_CLASSES, calibration=256, seed=seed)
    val = list(plain_images(data, "val", arguments.images))
    model = vision_model(arguments.model, seed)
    base = snapshot(model)
    start = time.perf_counter()
    fine_tune_images(model, optimizer_for(model, strength, arguments.lr), data, arguments.steps, seed)
    seconds = time.perf_counter() - start
    tuned = snapshot(model)
    found = {
        "delta_norm": delta_norm(base, tuned),
        "finetuned": accuracy(model, val),
        "seconds": seconds,
    }
    objective = dtrain.HiddenChange(model, [data.normalise(data.split("calibration"))[0]])
    for method in (dtrain.DareX(keep=KEEP), dtrain.Dare(keep=KEEP)):
        delta = dtrain.compress(base, tuned, method, objective=objective, rules=RULES)
        model.load_state_dict(delta.state_dict(base))
        found[type(method).__name__] = accuracy(model, val)
        found["bytes"] = delta.file_bytes()
        model.load_state_dict(tuned)
    return found


def table(cells: dict[str, Any], strengths: list[float]) -> Table:
    view = Table(title=f"CIFAR-10, five unseen classes; mean ± standard deviation over seeds; keep={KEEP}")
    for name in ("strength", "runs", "|delta| / |base|", "fine-tuned", f"DareX(keep={KEEP})", f"Dare(keep={KEEP})"):
        view.add_column(name, justify="right")
    for strength in strengths:
        found = [value for key, value in cells.items() if key.split(" | ")[1] == str(strength)]
        if found:
            columns = [torch.tensor([f[key] for f in found]) for key in ("delta_norm", "finetuned", "DareX", "Dare")]
            shown = [f"{c.mean():.4f}" + (f" ± {c.std():.4f}" if len(c) > 1 else "") for c in columns]
            view.add_row(str(strength), str(len(found)), *shown)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.0, 1e-3, 1e-2])
    parser.add_argument("--steps", type=int, default=150, help="steps of 64 images")
    parser.add_argument("--images", type=int, default=5000, help="test images to score")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", default="runs/bench/adamr_cifar.json")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for seed in arguments.seeds:
        for strength in arguments.strengths:
            key = f"{seed} | {strength}"
            if key not in cells:
                cells[key] = cell(arguments, seed, strength)
                out.write_text(json.dumps(cells, indent=0))
                sys.stderr.write(f"{key}: {cells[key]}\n")
    Console(width=140).print(table(cells, arguments.strengths))


if __name__ == "__main__":
    main()
