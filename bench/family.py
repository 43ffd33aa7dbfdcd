"""DBMS with a base vector shared by a family, against files that know nothing of each other, at equal total bytes.

    python -m bench.family --seeds 0 1 2 --shared ../shared
    python -m bench.family --table --markdown                        # only show what has been measured

The family is MiniLM fine-tuned on SST-2, SUBJ and CoLA. One JSON cell per (keep rate, seed, way), which holds all three
tasks; it picks up where it stopped.

* "independent": one `SeededSign` file per task. "shared": one file with the mean of the three deltas (or their elected
  signs and magnitudes) as `SeededSign`, and one per task with the residual. Of the bytes of all payloads, a half or a
  quarter is the shared file's.
* The four files together have no more bytes than the three independent ones, before what they say of their fits.
* Scales are learnt per tensor, two of them where there is a base vector, by the hidden states of 128 unlabelled
  training sentences that were not trained on. The validation splits are only scored: accuracy for SST-2 and SUBJ, the
  correlation of Matthews for CoLA.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import dtrain
from bench.cells import (
    INPUTS,
    caption,
    chosen,
    compressed,
    describe,
    difference,
    figure,
    fill,
    greatest_keep,
    parser_for,
    scored,
    show,
    task_of,
)
from bench.record import Cell, Job, Results, read_results
from bench.tasks import Task

FAMILY = ("sst2", "subj", "cola")
KEEPS = (1 / 32,)
HEADER = ("keep", "way", "seeds", "total bytes", "of them shared", *FAMILY, "mean", "less independent", "processor s")


@dataclass(frozen=True)
class Way:
    """One way to store the family.

    Args:
        label: Its name in the table.
        fit: What fits the scales.
        merge: How the shared vector is made; empty for independent files.
        part: Part of the payload bytes that the shared file gets.
    """

    label: str
    fit: dtrain.Fit | None
    merge: str = ""
    part: float = 0.0


LEARN = dtrain.Learn(steps=30)
INDEPENDENT = Way("independent, learned", LEARN)
#: All keep rates and seeds of one group before the next.
GROUPS = (
    (
        Way("independent, no fit", None),
        INDEPENDENT,
        Way("shared mean, half, learned", LEARN, "mean", 0.5),
    ),
    (
        Way("shared elect, half, learned", LEARN, "elect", 0.5),
        Way("shared mean, quarter, learned", LEARN, "mean", 0.25),
    ),
)


def sign(keep: float, seed: int) -> dtrain.SeededSign:
    return dtrain.SeededSign(keep=keep, seed=seed)


def jobs(seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells, in the order in which they are measured."""
    for ways in GROUPS:
        for keep in KEEPS:
            for seed in seeds:
                for way in ways:
                    yield job(keep, seed, shared, way)


def job(keep: float, seed: int, shared: Path, way: Way) -> Job:
    def measure() -> Cell:
        tasks = [task_of(name, seed, shared) for name in FAMILY]
        return measure_shared(tasks, keep, seed, way) if way.merge else independent(tasks, keep, seed, way)

    settings = {"fit": describe(way.fit), "merge": way.merge, "part": way.part, "inputs": INPUTS}
    return Job(key(keep, seed, way.label), settings, measure, tuple((name, seed) for name in FAMILY))


def independent(tasks: Sequence[Task], keep: float, seed: int, way: Way) -> Cell:
    found: dict[str, Cell] = {}
    for task in tasks:
        delta, cell = compressed(task, sign(keep, seed), way.fit)
        found[task.name] = {**cell, **scored(task, delta)}
    return {"shared_bytes": 0, **totals(found, 0)}


def measure_shared(tasks: Sequence[Task], keep: float, seed: int, way: Way) -> Cell:
    most = sum(dtrain.compress(t.base, t.tuned, sign(keep, seed)).file_bytes() for t in tasks)
    chosen_keep = greatest_keep(lambda k: family_bytes(tasks, k, seed, way), most, keep / 2, keep)
    if chosen_keep is None:
        return {"refused": f"at half of the keep rate, {keep / 2}, the four files take more than {most} bytes."}
    vector = base_vector(tasks, chosen_keep, seed, way)
    method = dtrain.Dbms(sign((1 - way.part) * chosen_keep, seed), source="shared")
    found: dict[str, Cell] = {}
    for task in tasks:
        delta, cell = compressed(task, method, way.fit, shared=vector)
        found[task.name] = {**cell, **scored(task, delta)}
    return {"keep": chosen_keep, "shared_bytes": vector.file_bytes(), **totals(found, vector.file_bytes())}


def base_vector(tasks: Sequence[Task], keep: float, seed: int, way: Way) -> dtrain.Delta:
    method = sign(len(tasks) * way.part * keep, seed)
    merge: Any = way.merge
    return dtrain.shared_base(tasks[0].base, [task.tuned for task in tasks], method, merge=merge)


def family_bytes(tasks: Sequence[Task], keep: float, seed: int, way: Way) -> int:
    """Return the bytes of all files, before anything is fitted."""
    vector = base_vector(tasks, keep, seed, way)
    method = dtrain.Dbms(sign((1 - way.part) * keep, seed), source="shared", lam=1.0, eta=1.0)
    deltas = (dtrain.compress(task.base, task.tuned, method, shared=vector) for task in tasks)
    return vector.file_bytes() + sum(delta.file_bytes() for delta in deltas)


def totals(found: dict[str, Cell], shared: int) -> Cell:
    return {
        "total_bytes": shared + sum(cell["file_bytes"] for cell in found.values()),
        "seconds": sum(cell["seconds"] for cell in found.values()),
        "mean_score": fmean(cell["score"] for cell in found.values()),
        "tasks": found,
    }


def key(keep: float, seed: int, label: str) -> str:
    return f"{keep:.6g} | {seed} | {label}"


def rows(results: Results) -> list[list[str]]:
    seeds = sorted({int(reference.split(" | ")[1]) for reference in results["references"]})
    out: list[list[str]] = []
    for keep in KEEPS:
        for way in (way for ways in GROUPS for way in ways):
            pairs = [(cell(results, keep, seed, way), cell(results, keep, seed, INDEPENDENT)) for seed in seeds]
            pairs = [pair for pair in pairs if "tasks" in pair[0]]
            if pairs:
                out.append([f"1/{1 / keep:g}", way.label, *figures(way, pairs)])
    return out


def figures(way: Way, pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    first = [cell for cell, _ in pairs]
    both = [(cell["mean_score"], other["mean_score"]) for cell, other in pairs if "tasks" in other]
    return [
        str(len(first)),
        f"{fmean(cell['total_bytes'] for cell in first):,.0f}",
        f"{fmean(cell['shared_bytes'] for cell in first):,.0f}",
        *(figure([cell["tasks"][name]["score"] for cell in first]) for name in FAMILY),
        figure([cell["mean_score"] for cell in first]),
        "-" if way == INDEPENDENT or not both else difference(*zip(*both, strict=True)),
        f"{fmean(cell['seconds'] for cell in first):.0f}",
    ]


def cell(results: Results, keep: float, seed: int, way: Way) -> Cell:
    return results["cells"].get(key(keep, seed, way.label), {})


def main() -> None:
    parser = parser_for(__doc__)
    arguments = parser.parse_args()
    out = arguments.out or Path("bench/results/family.json")
    if not arguments.table:
        fill(out, chosen(jobs(arguments.seeds, arguments.shared), arguments.only), arguments.shared)
    results = read_results(out)
    if not results["references"]:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    show(HEADER, rows(results), caption(results), arguments.markdown)


if __name__ == "__main__":
    main()
