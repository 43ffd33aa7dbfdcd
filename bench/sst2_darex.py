"""Dare against DareX on a real encoder: scores and file bytes over keep rates, masks and ways to find q.

    python -m bench.sst2_darex --model ../shared/models/all-MiniLM-L6-v2 --data ../shared/data/sst2

Fine-tunes once per seed (cached), then fills one JSON cell per (seed, way, keep, mask); it picks up where it stopped.
q is searched on training sentences that were not trained on; the validation split is only scored. All matrices are
compressed, the embeddings too, norms and biases are kept in half precision and the head as it is.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import dtrain
from bench.presets import RULES
from bench.tasks import State, accuracy, call, snapshot
from bench.tasks.text import Sentences, fine_tune_sentences, read_sentences, text_model
from parts.probe import probe_accuracy

KEEPS = (0.1, 0.03, 0.01, 0.003)
MASKS = (0, 1, 2)
WAYS = ("dare", "q_e model", "q_v model", "q_e layer", "q_v layer")


def compress(
    way: str, keep: float, mask: int, base: State, tuned: State, model: nn.Module, data: Sentences
) -> dtrain.Delta:
    if way == "dare":
        return dtrain.compress(base, tuned, dtrain.Dare(keep=keep, seed=100 * mask), rules=RULES)
    layer = way.endswith("layer")  # hundreds of evaluations: one mask instead of three
    searched = data.held_out[:1]  # 64 sentences
    objective: dtrain.Objective
    if way.startswith("q_e"):
        objective = dtrain.HiddenChange(model, [inputs for inputs, _ in searched], call)
    else:
        objective = dtrain.Metric(model, lambda module: accuracy(module, searched))
    method = dtrain.DareX(keep=keep, seed=100 * mask, scope="layer" if layer else "model", masks=1 if layer else 3)
    return dtrain.compress(base, tuned, method, objective=objective, rules=RULES)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for seed in arguments.seeds:
        model = text_model(arguments.model, seed)
        base = snapshot(model)
        data = read_sentences(arguments.model, arguments.data, arguments.train_size, seed)
        cache = out.parent / f"{out.stem}_tuned_{seed}.safetensors"
        if not cache.exists():
            fine_tune_sentences(model, data, seed)
            save_file(model.state_dict(), cache)
        tuned = load_file(cache)
        if f"{seed} references" not in cells:
            scores = {}
            for name, state in (("base", base), ("fine-tuned", tuned)):
                model.load_state_dict(state)
                scores[name] = accuracy(model, data.val)
            model.load_state_dict(base)
            cells[f"{seed} references"] = {**scores, "linear probe": probe_accuracy(model, data.train, data.val)}
        for way in arguments.ways:
            for keep in arguments.keeps:
                for mask in MASKS:
                    key = f"{seed} | {way} | {keep} | {mask}"
                    if key not in cells:
                        model.load_state_dict(tuned)
                        start = time.perf_counter()
                        delta = compress(way, keep, mask, base, tuned, model, data)
                        seconds = time.perf_counter() - start
                        model.load_state_dict(delta.state_dict(base))
                        fit = delta.content.metadata.get("fit", {})
                        cell = {"score": accuracy(model, data.val), "bytes": delta.file_bytes(), "seconds": seconds}
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
            if not found:
                row.append("-")
                continue
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
