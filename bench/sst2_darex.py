"""Dare against DareX on a real encoder: scores and file bytes over keep rates, masks and ways to find q.

    python -m bench.sst2_darex --model ../shared/models/all-MiniLM-L6-v2 --data ../shared/data/sst2

Fine-tunes once per seed (cached), then fills one JSON cell per (seed, way, keep, mask); it picks up where it stopped.
q is searched on training sentences that were not trained on; the validation split is only scored.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

import dtrain

KEEPS = (0.1, 0.03, 0.01, 0.003)
MASKS = (0, 1, 2)
WAYS = ("dare", "q_e model", "q_v model", "q_e layer", "q_v layer")
HELD_OUT = 64  # training sentences that q is searched on

Batch = tuple[dict[str, Tensor], Tensor]


class Classifier(nn.Module):
    """Mean-pooled encoder and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


@dataclass
class Task:
    """Batches of the three disjoint parts of the data."""

    train: list[Batch]
    held_out: list[Batch]  # training sentences that are not trained on
    val: list[Batch]


def read(model: str, data: str, train_size: int, seed: int) -> Task:
    tokenizer, splits = AutoTokenizer.from_pretrained(model), load_dataset(data)
    text = next(name for name in ("sentence", "text") if name in splits["train"].column_names)

    def batches(rows: Any, size: int) -> list[Batch]:
        out = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs = tokenizer(part[text], padding=True, truncation=True, max_length=64, return_tensors="pt")
            out.append((dict(inputs), torch.tensor(part["label"])))
        return out

    shuffled = splits["train"].shuffle(seed=seed)
    held = shuffled.select(range(HELD_OUT))
    train = shuffled.select(range(256, 256 + train_size))
    val = splits["validation"].map(lambda row: {"length": len(row[text])}).sort("length")  # less padding, same score
    return Task(batches(train, 32), batches(held, 64), batches(val, 64))


@torch.no_grad()
def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    right = sum(int((model(inputs).argmax(-1) == labels).sum()) for inputs, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def fine_tune(model: nn.Module, task: Task, seed: int, lr: float = 5e-5) -> None:
    torch.manual_seed(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=len(task.train), pct_start=0.1)
    for step, (inputs, labels) in enumerate(task.train):
        loss = cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"step {step}/{len(task.train)} loss {loss.detach():.3f}\n")


def probe(model: nn.Module, task: Task) -> float:
    """Return the accuracy of a linear classifier on the frozen base, trained on the same sentences."""
    from sklearn.linear_model import LogisticRegression

    def features(batches: list[Batch]) -> tuple[Any, Any]:
        found: list[Tensor] = []
        hook = model.head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        accuracy(model, batches)
        hook.remove()
        return torch.cat(found).numpy(), torch.cat([labels for _, labels in batches]).numpy()

    return float(LogisticRegression(max_iter=1000).fit(*features(task.train)).score(*features(task.val)))


def compress(
    way: str, keep: float, mask: int, base: dict[str, Tensor], tuned: dict[str, Tensor], model: nn.Module, task: Task
) -> dtrain.Delta:
    if way == "dare":
        return dtrain.compress(base, tuned, dtrain.Dare(keep=keep, seed=100 * mask))
    layer = way.endswith("layer")  # hundreds of evaluations: one mask instead of three
    objective: dtrain.Objective
    if way.startswith("q_e"):
        objective = dtrain.HiddenChange(model, [inputs for inputs, _ in task.held_out], call)
    else:
        objective = dtrain.Metric(model, lambda module: accuracy(module, task.held_out))
    method = dtrain.DareX(keep=keep, seed=100 * mask, scope="layer" if layer else "model", masks=1 if layer else 3)
    return dtrain.compress(base, tuned, method, objective=objective)


def call(module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return module(inputs)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        model = Classifier(AutoModel.from_pretrained(arguments.model))
        base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        task = read(arguments.model, arguments.data, arguments.train_size, seed)
        cache = out.parent / f"{out.stem}_tuned_{seed}.safetensors"
        if not cache.exists():
            fine_tune(model, task, seed)
            save_file(model.state_dict(), cache)
        tuned = load_file(cache)
        if f"{seed} references" not in cells:
            scores = {}
            for name, state in (("base", base), ("fine-tuned", tuned)):
                model.load_state_dict(state)
                scores[name] = accuracy(model, task.val)
            model.load_state_dict(base)
            cells[f"{seed} references"] = {**scores, "linear probe": probe(model, task)}
        for way in arguments.ways:
            for keep in arguments.keeps:
                for mask in MASKS:
                    key = f"{seed} | {way} | {keep} | {mask}"
                    if key not in cells:
                        model.load_state_dict(tuned)
                        start = time.perf_counter()
                        delta = compress(way, keep, mask, base, tuned, model, task)
                        seconds = time.perf_counter() - start
                        model.load_state_dict(delta.state_dict(base))
                        fit = delta.content.metadata.get("fit", {})
                        cell = {"score": accuracy(model, task.val), "bytes": delta.file_bytes(), "seconds": seconds}
                        cells[key] = {**cell, "q": fit.get("q"), "evaluations": fit.get("evaluations")}
                        out.write_text(json.dumps(cells, indent=0))
                        sys.stderr.write(f"{key}: {cells[key]}\n")
    return cells


def table(cells: dict[str, Any]) -> Table:
    view = Table(title="SST-2 validation accuracy (mean and spread over masks and seeds), file bytes")
    for column in ("way", *(f"keep {keep}" for keep in KEEPS)):
        view.add_column(column, justify="right")
    for way in WAYS:
        row = [way]
        for keep in KEEPS:
            found = [cell for key, cell in cells.items() if key.split(" | ")[1:3] == [way, str(keep)]]
            if found:
                scores = torch.tensor([cell["score"] for cell in found])
                spread = f" ±{scores.std():.3f}" if len(found) > 1 else ""
                row.append(f"{scores.mean():.3f}{spread}  {found[0]['bytes']:,} B  {found[0]['seconds']:.0f} s")
        view.add_row(*row)
    references = [cell for key, cell in cells.items() if key.endswith("references")]
    means = {name: sum(cell[name] for cell in references) / len(references) for name in references[0]}
    view.caption = (
        ", ".join(f"{name} {value:.3f}" for name, value in means.items()) + f"; {len(references)} fine-tune(s)"
    )
    return view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a pre-trained encoder")
    parser.add_argument("--data", required=True, help="folder of Parquet files with sentence and label")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument("--train-size", type=int, default=8000, help="training sentences, one epoch")
    parser.add_argument("--out", default="runs/bench/sst2_darex.json")
    Console(width=150).print(table(run(parser.parse_args())))


if __name__ == "__main__":
    main()
