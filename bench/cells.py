"""What the experiments share: cells that a run picks up where it stopped, figures over seeds, tables.

An experiment is a JSON file of references (scores of base, linear probe and fine-tuned model by task and seed) and
cells, each with the settings that it was measured with: it is measured anew once they change.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import dtrain
from bench import record
from bench.record import Cell, Job, Results
from bench.tasks import Task, task

INPUTS, BATCH = 128, 32  # unlabelled training inputs that scales are fitted to: four batches, of which Learn holds one


@lru_cache(maxsize=3)  # a family has three
def task_of(name: str, seed: int, shared: Path, inputs: int = INPUTS) -> Task:
    """Return a task with unlabelled training inputs in small batches."""
    return task(name, shared, seed, inputs, BATCH)


def fill(out: Path, jobs: Iterable[Job], shared: Path) -> None:
    """Measure the cells that `out` does not have, in the order given, with the references of their tasks."""
    torch.set_num_threads(1)  # processor seconds and scores do not depend on the machine's cores

    def references(job: Job) -> dict[str, Cell]:
        return {f"{name} | {seed}": task_of(name, seed, shared).references for name, seed in job.tasks}

    record.fill(out, jobs, references)


def plain(value: Any) -> Any:
    """Return `value` as it reads back from a JSON file."""
    return json.loads(json.dumps(value))


def describe(fit: dtrain.Fit | None) -> dict[str, Any] | None:
    """Return all arguments of a fit, the defaults too: a cell is measured anew once one of them changes."""
    return None if fit is None else {"name": type(fit).__name__, **plain(asdict(fit))}  # type: ignore[call-overload]


def compressed(
    task: Task,
    method: dtrain.Method,
    fit: dtrain.Fit | None = None,
    objective: str = "hidden",
    batches: int | None = None,
    **arguments: Any,
) -> tuple[dtrain.Delta, Cell]:
    """Compress the task's fine-tune.

    Args:
        task: What is compressed.
        method: How.
        fit: What fits the scales; None for the method's own, if it has one.
        objective: What they are fitted to: "hidden" or "logits".
        batches: How many batches of inputs are used; None for all.
        arguments: Passed on to `dtrain.compress`.

    Returns:
        The delta, and a cell of how long it took and what the fit says of itself.
    """
    data = task.objective(objective, batches)  # leaves the fine-tuned weights in the model
    wall, spent = time.perf_counter(), time.process_time()
    delta = dtrain.compress(task.base, task.tuned, method, fit=fit, objective=data, **arguments)
    seconds = {"seconds": time.process_time() - spent, "wall_seconds": time.perf_counter() - wall}
    return delta, {**seconds, "method": plain(method.describe()), "fit": delta.content.metadata.get("fit")}


def scored(task: Task, delta: dtrain.Delta) -> Cell:
    """Return score, accuracy, hidden change on all unlabelled inputs, and size of a delta."""
    objective, state = task.objective("hidden"), delta.state_dict(task.base)
    objective.remember()
    found = task.scores(state)  # leaves the compressed weights in the model
    report = delta.report()
    sizes = {"file_bytes": report.file_bytes, "file_ratio": report.ratio}
    return {**found, "hidden_change": objective.loss(), **sizes}


def greatest_keep(size: Callable[[float], int], most: int, low: float = 2**-20, high: float = 1.0) -> float | None:
    """Return the greatest keep whose file, of `size(keep)` bytes, has `most` bytes or fewer, to 0.1 %.

    None says that not even the file at `low` is small enough.
    """
    if size(low) > most:
        return None
    if size(high) <= most:
        return high
    while high / low > 1.001:
        middle = float(f"{math.sqrt(low * high):.6g}")  # few digits: the file holds them
        low, high = (middle, high) if size(middle) <= most else (low, middle)
    return low


def figure(values: Sequence[float], digits: int = 3) -> str:
    """Return mean and standard deviation."""
    return f"{fmean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def difference(values: Sequence[float], others: Sequence[float], digits: int = 3) -> str:
    """Return the mean paired difference and its standard error."""
    found = [value - other for value, other in zip(values, others, strict=True)]
    error = f" ± {stdev(found) / math.sqrt(len(found)):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):+.{digits}f}{error}"


def share(kept: Sequence[float], gains: Sequence[float]) -> tuple[float, float | None] | None:
    """Return the share of the gain that is kept and its standard error over the seeds; None where nothing was gained.

    Both are summed over the seeds before they are divided; the error is that of a ratio of means (linearised).
    """
    gain = fmean(gains)
    if gain <= 0:
        return None
    ratio = fmean(kept) / gain
    if len(kept) < 2:
        return ratio, None
    rest = [k - ratio * g for k, g in zip(kept, gains, strict=True)]
    return ratio, math.sqrt(sum(r * r for r in rest) / (len(rest) - 1) / len(rest)) / gain


def show_share(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "-"
    return f"{found[0]:.1%}" + ("" if found[1] is None else f" ± {found[1]:.1%}")


def caption(results: Results) -> str:
    """Return one line per task: the scores of base, linear probe and fine-tuned model."""
    lines: list[str] = []
    for name in dict.fromkeys(key.split(" | ")[0] for key in results["references"]):
        found = [value for key, value in results["references"].items() if key.startswith(f"{name} | ")]
        scores = (f"{label} {figure([f[label] for f in found])}" for label in ("base", "linear probe", "fine-tuned"))
        lines.append(f"{name}, {len(found)} fine-tune(s), mean ± standard deviation: {', '.join(scores)}")
    return "\n".join(lines)


def show(header: Sequence[str], rows: Sequence[Sequence[str]], notes: str, markdown: bool, left: int = 2) -> None:
    """Print a table whose first `left` columns are words; a line sets off where the first one changes."""
    if markdown:
        rule = ["---" if column < left else "--:" for column in range(len(header))]
        lines = [f"| {' | '.join(line)} |" for line in (header, rule, *rows)]
        sys.stdout.write("\n".join(lines) + f"\n\n{notes}\n")
        return
    view = Table(caption=notes, caption_justify="left")
    for column, name in enumerate(header):
        view.add_column(name, justify="left" if column < left else "right")
    for this, following in zip(rows, [*rows[1:], None], strict=True):
        view.add_row(*this, end_section=following is not None and following[0] != this[0])
    Console(width=180).print(view)


def parser_for(doc: str | None, **task: Any) -> argparse.ArgumentParser:
    """Return a parser with what all experiments ask for; `task` makes the option of that name."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if task:
        parser.add_argument("--task", **task)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="measure cells with a word in their key")
    parser.add_argument("--out", type=Path, help="results file; its default is named after the experiment")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    parser.add_argument("--markdown", action="store_true", help="show the table as Markdown")
    return parser


def chosen(jobs: Iterable[Job], only: Sequence[str]) -> Iterable[Job]:
    """Return the jobs with one of the words in their key; all of them where there are no words."""
    return (job for job in jobs if not only or any(word in job.key for word in only))
