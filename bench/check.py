"""Measure a seeded sample of the checked-in cells again, and compare: `python -m bench.check [--seed 0]`.

Tasks and seeds are drawn first, then cells of each, so that few models have to be fine-tuned where nothing is cached.
A cell agrees if its file has the same bytes to one percent, and its score is within three standard errors of a score
on so many examples: a fine-tune that another machine makes anew is another draw, while one from the cache agrees
exactly but for what a fit sums in another order. Only cells with a score are drawn: not what does not fit, nor AdamR's,
the learning rates and the speed. Ends with 1, and a sentence for every cell that differs.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from bench.cells import task_of
from bench.quality.jobs import TASKS, jobs
from bench.quality.tables import RESULTS
from bench.record import Cell, Job, read_results

BYTES, ERRORS = 0.011, 3.0  # what the search for a knob leaves open, and a little


def sample(results: Path, shared: Path, seed: int, each: int) -> Iterator[tuple[Job, Cell]]:
    """Yield cells and what makes them: `each` of one (task, seed) after another, both in an order drawn from `seed`."""
    draw = random.Random(seed)  # noqa: S311 - a sample that can be drawn again, not a secret
    groups = [(name, at) for name in TASKS for at in (0, 1, 2)]
    for name, at in draw.sample(groups, len(groups)):
        cells = read_results(results / f"{name}.json")["cells"]
        known = {job.key: job for job in jobs((name,), (at,), shared)}
        scored = (key for key in known if "score" in cells.get(key, {}))
        keys = sorted(key for key in scored if cells[key]["settings"] == known[key].settings)
        for key in draw.sample(keys, min(each, len(keys))):
            yield known[key], cells[key]


def differences(job: Job, old: Cell, new: Cell, examples: int) -> Iterator[str]:
    """Yield a sentence for everything in which a cell differs from the one that is checked in."""
    name = f"{job.tasks[0][0]} | {job.key}"
    if ("refused" in old) != ("refused" in new):
        yield f"{name}: {new.get('refused', 'it fits now')}, and checked in is: {old.get('refused', 'it fits')}."
        return
    if "refused" in old:
        return
    if abs(new["file_bytes"] / old["file_bytes"] - 1) > BYTES:
        yield f"{name}: {new['file_bytes']} bytes, and {old['file_bytes']} are checked in."
    if abs(new["score"] - old["score"]) > tolerance(old["score"], examples):
        yield f"{name}: a score of {new['score']:.4f}, and {old['score']:.4f} is checked in."


def tolerance(score: float, examples: int) -> float:
    """Return three standard errors of an accuracy."""
    share = min(max(score, 0.05), 0.95)
    return ERRORS * math.sqrt(share * (1 - share) / examples)


def check(pairs: Iterator[tuple[Job, Cell]], shared: Path, minutes: float) -> tuple[Table, list[str]]:
    """Measure cells until the time is over; return what was found, and sentences about what differs."""
    end = time.monotonic() + 60 * minutes
    table, wrong = Table("cell", "bytes", "checked in", "score", "checked in"), []
    for job, old in pairs:
        if time.monotonic() > end:
            break
        new = job.measure()
        examples = sum(len(labels) for _, labels in task_of(*job.tasks[0], shared).val)
        wrong += differences(job, old, new, examples)
        shown = [f"{cell.get(field, '-')}" for field in ("file_bytes", "score") for cell in (new, old)]
        table.add_row(f"{job.tasks[0][0]} | {job.key}", *shown)
        sys.stderr.write(f"{job.tasks[0][0]} | {job.key}: {shown}\n")
    return table, wrong


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--minutes", type=float, default=50.0, help="no cell is begun later than this")
    parser.add_argument("--each", type=int, default=6, help="cells of a task and seed")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = sample(given.results, given.shared, given.seed, given.each)
    table, wrong = check(pairs, given.shared, given.minutes)
    Console(width=140).print(table)
    for sentence in wrong:
        sys.stderr.write(f"{sentence}\n")
    if not table.row_count:
        sys.stderr.write(f"{given.results} holds no cell that could be measured again. Run python -m bench.quality.\n")
    return 1 if wrong or not table.row_count else 0


if __name__ == "__main__":
    sys.exit(main())
