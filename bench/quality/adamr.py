"""AdamR's strength as an axis: how far the fine-tune goes, how good it is, and what survives compression.

    python -m bench.quality.adamr --task digits --seeds 0 1 2

The task's own training with `dtrain.AdamR` instead of AdamW: all matrices are pulled to the base, the rest has strength
0. Every fine-tune is compressed to two budgets. One JSON cell per (task, seed, strength).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean

from bench.adamr_cifar import delta_norm, optimizer_for
from bench.cells import INPUTS, chosen, figure, fill, parser_for, task_of
from bench.quality.entries import CHOSEN, ENTRIES
from bench.quality.jobs import TASKS
from bench.quality.measure import measure
from bench.record import Cell, Job
from bench.tasks import Task, snapshot

OUT = Path("bench/results/quality/adamr.json")
EARLIER = Path("bench/results/adamr_cifar.json")
STRENGTHS = (0.0, 1e-3, 1e-2, 1e-1)
LABELS = (CHOSEN, "DARE, seeded")
AT = (1.0, 0.25)
NOTE = (
    "At strength 0 these are the fine-tunes of the tables above. Where a score differs from theirs, the keep rate does "
    "(by less than 1 %), and with it the mask: so much hangs on the draw."
)


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    for seed, name, strength in product(seeds, names, STRENGTHS):
        yield job(name, seed, shared, strength)


def job(name: str, seed: int, shared: Path, strength: float) -> Job:
    entries = [ENTRIES[label] for label in LABELS]
    settings = {"strength": strength, "budgets": list(AT), "entries": [entry.settings(seed) for entry in entries]}

    def run() -> Cell:
        task, cell = fine_tuned(task_of(name, seed, shared), strength)
        for entry, budget in product(entries, AT):
            found = measure(task, entry, budget)
            cell[f"{entry.label} | {budget:g}"] = found.get("score")
        return cell

    return Job(f"{name} | {seed} | {strength:g}", {**settings, "inputs": INPUTS}, run, ((name, seed),))


def fine_tuned(task: Task, strength: float) -> tuple[Task, Cell]:
    """Return the task with another fine-tune, and how that went."""
    if task.training is None:
        raise ValueError(f"how {task.name} was fine-tuned is not known.")
    model = deepcopy(task.model)
    model.load_state_dict(task.base)
    start = time.process_time()
    task.training.run(model, optimizer_for(model, strength, task.training.lr), task.seed)
    seconds = time.process_time() - start
    tuned = snapshot(model)
    cell = {"seconds": seconds, "delta_norm": delta_norm(task.base, tuned), "fine-tuned": task.score(tuned)}
    return replace(task, tuned=tuned, sizes={}), cell


def markdown() -> str:
    """Return the table of what has been measured, and that of the earlier experiment on CIFAR-10."""
    parts = [f"{NOTE}\n\n{rows()}" if OUT.exists() else "Not measured yet: `python -m bench.quality.adamr`.\n"]
    if EARLIER.exists():
        parts += ["On CIFAR-10 (150 steps, keep 0.01, `python -m bench.adamr_cifar`):\n", earlier()]
    return "\n".join(parts)


def rows() -> str:
    """Return one row per task and strength: means and deviations over the seeds."""
    from bench.quality.tables import table

    cells: dict[tuple[str, float], list[Cell]] = {}
    for key, cell in json.loads(OUT.read_text())["cells"].items():
        name, _, strength = key.split(" | ")
        cells.setdefault((name, float(strength)), []).append(cell)
    keys = [f"{label} | {budget:g}" for label, budget in product(LABELS, AT)]
    lines: list[list[str]] = []
    for (name, strength), found in sorted(cells.items()):
        compressed = [
            figure([c[key] for c in found]) if all(c[key] is not None for c in found) else "-" for key in keys
        ]
        norms = figure([c["delta_norm"] for c in found])
        spent = f"{fmean(c['seconds'] for c in found):.0f}"
        tuned = figure([c["fine-tuned"] for c in found])
        lines.append([name, f"{strength:g}", str(len(found)), spent, norms, tuned, *compressed])
    shown = [f"{key.replace(' | ', ' at ')} bit" for key in keys]
    return table(("task", "strength", "seeds", "training, processor s", "delta / base", "fine-tuned", *shown), lines)


def earlier() -> str:
    from bench.quality.tables import table

    cells: dict[float, list[Cell]] = {}
    for key, cell in json.loads(EARLIER.read_text()).items():
        cells.setdefault(float(key.split(" | ")[1]), []).append(cell)
    fields = ("delta_norm", "finetuned", "DareX", "Dare")
    lines = [
        [f"{strength:g}", str(len(found)), *(figure([c[field] for c in found]) for field in fields)]
        for strength, found in sorted(cells.items())
    ]
    return table(("strength", "seeds", "delta / base", "fine-tuned", "`DareX`", "`Dare`"), lines)


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, nargs="+", default=["digits"])
    arguments = parser.parse_args()
    todo = jobs(arguments.task, arguments.seeds, arguments.shared)
    fill(arguments.out or OUT, chosen(todo, arguments.only), arguments.shared)


if __name__ == "__main__":
    main()
