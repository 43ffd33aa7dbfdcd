"""Methods against each other at the same budgets, on two real tasks: bytes in the file, accuracy, time.

    python -m bench.presets --task sst2 --seeds 0 1 2 --shared ../shared
    python -m bench.presets --task sst2 --table --markdown            # only show what has been measured

One JSON cell per (seed, budget, method); it picks up where it stopped, and measures a cell anew once its method's
settings have changed. A budget is a target in bits per compressed weight. Methods are fitted to 128 training inputs
that were not trained on; the validation split is only scored. All matrices are compressed, the embeddings too, norms
and biases are kept in half precision and the head as it is. Times are processor seconds of `dtrain.compress` on one
thread, as a ratio to plain `Dare` at the same budget, which is timed again beside every cell.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dtrain
from bench.record import Cell, read_results, write_json
from bench.tasks import TASKS, Task
from dtrain.artifact import Content, Record, Role
from dtrain.methods.accounting import binary_entropy

BUDGETS = (1.0, 0.25, 0.06, 0.015)
HEADER = (
    "bit/weight, target",
    "method",
    "seeds",
    "file bytes",
    "bit/param on disk",
    "bit/weight on disk",
    "nominal ratio",
    "file ratio",
    "accuracy",
    "gain kept over base",
    "over probe",
    "time / Dare's",
)

RULES = dtrain.Rules(embeddings=(), vectors="float16", fresh="exact")  # the matrices alone are compared


def catalogue(budget: float, seed: int) -> dict[str, dtrain.Method]:
    """Return the methods that can be set to `budget` bits per compressed weight, in the order of the table.

    What a method's positions and tables cost is part of its budget: each is set by its true bits, not by the nominal.
    """
    keep = budget / 16  # a kept value is a float16, its position a seed
    stored = solve(lambda share: 16 * share + binary_entropy(share), budget)  # its position is not
    ternary = solve(lambda share: share + binary_entropy(share), budget)
    pruned = solve(lambda share: 1.5 * share + binary_entropy(share), budget)  # four-bit levels of 1.5 bits' entropy
    patch = 32 if budget > 0.1 else 64  # half precision for the mean of every patch, minimum and step of the strong
    strong = (budget - 16 / patch**2) / (2 + 16 / patch**2)
    methods: dict[str, dtrain.Method] = {
        "Dare": dtrain.Dare(keep=keep, seed=seed),
        "DareX, q_e": dtrain.DareX(keep=keep, seed=seed, masks=1),
        "Structured": dtrain.Structured(keep=keep, seed=seed, q="keep"),
        "Magnitude": dtrain.Magnitude(keep=stored),
        "Wanda": dtrain.Wanda(keep=stored),
        "DeltaDQ": dtrain.DeltaDQ(alpha=math.ceil(2.3 / budget), seed=seed),  # a code costs about 2.3 bits
        "DeltaDQ, group search": dtrain.DeltaDQ(alpha=math.ceil(2.3 / budget), group="search", seed=seed),
        "DeltaDCT": dtrain.DeltaDCT(patch=patch, bits=(2, 0), shares=(strong, 1 - strong)),
        "ComPEFT": dtrain.ComPEFT(keep=ternary),
        "ImPart": dtrain.ImPart(keep=keep, seed=seed),
        "UltraDelta": dtrain.UltraDelta(keep=pruned, seed=seed),
        "Ecsq": dtrain.Ecsq(bits=budget),
    }
    if budget >= 1:
        methods["BitDelta"] = dtrain.BitDelta()
        methods["BitDelta, rows"] = dtrain.BitDelta(scale="row")
    else:
        methods["SeededSign"] = dtrain.SeededSign(keep=budget, seed=seed)
        methods["SeededSign, q_e"] = dtrain.SeededSign(keep=budget, seed=seed, q="search", masks=1)
    if budget > 0.05:  # below, one pair of vectors costs more than the budget
        methods["DeltaCoMe"] = dtrain.DeltaCoMe(budget=budget / 1.06)
        methods["DeltaCoMe, GPTQ"] = dtrain.DeltaCoMe(budget=budget / 1.06, gptq=True)
    if budget > 0.2:
        rank = 4 if budget >= 1 else 1  # a rank costs about 0.035 bit per weight on these shapes
        host = dtrain.Magnitude(keep=solve(lambda share: 16 * share + binary_entropy(share), budget - 0.035 * rank))
        methods["EoRA on Magnitude"] = dtrain.EoRA(host=host, rank=rank)
    return methods


def solve(cost: Callable[[float], float], budget: float, most: float = 0.5) -> float:
    """Return the share in (0, most] whose `cost` in bits, which grows with it, is `budget`, to 1e-6."""
    low, high = 0.0, most
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle)
    return round(low, 6)


def compress(task: Task, method: dtrain.Method) -> dtrain.Delta:
    """Compress the task's fine-tune with what the method needs."""
    objective = task.objective() if method.needs == "objective" else None
    calibration = task.calibration() if method.needs_calibration else None
    return dtrain.compress(task.base, task.tuned, method, objective=objective, calibration=calibration, rules=RULES)


def timed(task: Task, method: dtrain.Method) -> tuple[dtrain.Delta, float]:
    """Return the delta and the processor seconds it took: the least of up to five calls, where they are quick."""
    spent: list[float] = []
    while True:
        start = time.process_time()  # the machine is shared: waiting for a core is no part of the cost
        delta = compress(task, method)
        spent.append(time.process_time() - start)
        if len(spent) == 5 or sum(spent) > 2:
            return delta, min(spent)


def measure(task: Task, budget: float, method: dtrain.Method) -> Cell:
    """Return one cell: sizes, score and time, or why the method refuses."""
    cell: Cell = {"settings": settings(method)}
    try:
        delta, seconds = timed(task, method)
    except dtrain.InputError as error:
        return cell | {"refused": str(error)}
    report, weights = delta.report(), compressed_weights(delta.content)
    bits = report.nominal_bits
    return cell | {
        "file_bytes": report.file_bytes,
        "bits_per_parameter": report.bits_per_parameter,
        "bits_per_weight": 8 * sum(r.payload_bytes for r in weights) / sum(math.prod(r.shape) for r in weights),
        "nominal_bits": bits,
        "nominal_ratio": 8 * weights[0].dtype.itemsize / bits if bits else None,
        "file_ratio": report.ratio,
        "score": task.score(delta.state_dict(task.base)),
        "seconds": seconds,
        "dare_seconds": timed(task, dtrain.Dare(keep=budget / 16, seed=task.seed))[1],
    }


def compressed_weights(content: Content) -> list[Record]:
    """Return the records that the method compressed."""
    added = [record for record in content.records if record.role is Role.ADD]
    return [record for record in added if RULES.role(record.name, record.shape, record.dtype) == "method"]


def settings(method: dtrain.Method) -> dict[str, Any]:
    """Return the settings as they read back from a JSON file."""
    return json.loads(json.dumps(method.describe()))


def key(seed: int, budget: float, label: str) -> str:
    return f"{seed} | {budget} | {label}"


def fill(name: str, seeds: Sequence[int], shared: Path, out: Path, only: Sequence[str]) -> None:
    """Measure the cells that `out` does not have, and write it after each."""
    results = read_results(out)
    for seed in seeds:
        missing = [
            (budget, label, method)
            for budget in BUDGETS
            for label, method in catalogue(budget, seed).items()
            if (not only or label in only)
            and results["cells"].get(key(seed, budget, label), {}).get("settings") != settings(method)
        ]
        if not missing:
            continue
        task = TASKS[name](shared, seed)
        results["references"][str(seed)] = task.references
        compress(task, dtrain.Dare(keep=0.1))  # the first call of a process pays for its imports
        for budget, label, method in missing:
            cell = measure(task, budget, method)
            results["cells"][key(seed, budget, label)] = cell
            write_json(out, results)
            sys.stderr.write(f"{key(seed, budget, label)}: {cell}\n")


def row(budget: float, label: str, results: dict[str, dict[str, Cell]]) -> list[str]:
    """Return one row of the table: means over the seeds; gains are summed over the seeds before they are divided."""
    found = {
        seed: cell
        for seed in results["references"]
        if "score" in (cell := results["cells"].get(key(int(seed), budget, label), {}))
    }
    if not found:
        return [f"{budget:g}", label, *["-"] * (len(HEADER) - 2)]
    cells = list(found.values())

    def mean(field: str, style: str) -> str:
        values = [cell[field] for cell in cells if cell[field] is not None]
        return format(fmean(values), style) if values else "-"

    def gain_kept(floor: str) -> str:
        references = [results["references"][seed] for seed in found]
        gain = sum(reference["fine-tuned"] - reference[floor] for reference in references)
        kept = sum(cell["score"] - reference[floor] for cell, reference in zip(cells, references, strict=True))
        return f"{kept / gain:.0%}" if gain > 0 else "-"

    sizes = [mean("file_bytes", ",.0f"), mean("bits_per_parameter", ".4f"), mean("bits_per_weight", ".4f")]
    ratios = [mean("nominal_ratio", ",.0f"), mean("file_ratio", ",.0f")]
    slower = fmean(cell["seconds"] / cell["dare_seconds"] for cell in cells)
    gains = [spread([cell["score"] for cell in cells]), gain_kept("base"), gain_kept("linear probe")]
    return [f"{budget:g}", label, str(len(found)), *sizes, *ratios, *gains, f"{slower:.1f}"]


def spread(values: Sequence[float]) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def rows(results: dict[str, dict[str, Cell]]) -> list[list[str]]:
    return [row(budget, label, results) for budget in BUDGETS for label in catalogue(budget, 0)]


def caption(name: str, results: dict[str, dict[str, Cell]]) -> str:
    references = list(results["references"].values())
    scores = (f"{floor} {spread([r[floor] for r in references])}" for floor in ("base", "linear probe", "fine-tuned"))
    return f"{name}, {len(references)} fine-tune(s), mean ± standard deviation: {', '.join(scores)}"


def rich_table(name: str, results: dict[str, dict[str, Cell]]) -> Table:
    view = Table(caption=caption(name, results), caption_justify="left")
    for column in HEADER:
        view.add_column(column, justify="left" if column == "method" else "right")
    shown = rows(results)
    for this, following in zip(shown, [*shown[1:], None], strict=True):
        view.add_row(*this, end_section=following is not None and following[0] != this[0])
    return view


def markdown_table(name: str, results: dict[str, dict[str, Cell]]) -> str:
    lines = [HEADER, ["---" if column == "method" else "--:" for column in HEADER], *rows(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{caption(name, results)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="rows of the table to measure")
    parser.add_argument("--out", type=Path, help="default: bench/results/presets_TASK.json")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--markdown", action="store_true", help="show the table as Markdown")
    arguments = parser.parse_args()
    out = arguments.out or Path(f"bench/results/presets_{arguments.task}.json")
    if not arguments.table:
        torch.set_num_threads(1)  # processor seconds and scores do not depend on the machine's cores
        fill(arguments.task, arguments.seeds, arguments.shared, out, arguments.only)
    results = read_results(out)
    if not results["references"]:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    if arguments.markdown:
        sys.stdout.write(markdown_table(arguments.task, results))
    else:
        Console(width=180).print(rich_table(arguments.task, results))


if __name__ == "__main__":
    main()
