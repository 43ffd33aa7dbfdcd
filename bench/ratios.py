"""`SeededSign` with learned scales at 1000x, 2000x and 5000x smaller than the checkpoint, every byte counted.

    python -m bench.ratios --task sst2 subj cifar --seeds 0 1 2 --shared ../shared
    python -m bench.ratios --table --markdown                        # only show what has been measured

One JSON cell per (task, ratio, seed, fit); it picks up where it stopped.

* The keep rate is the greatest whose file has at most the bytes of the fine-tuned checkpoint over the ratio: payloads,
  scales, names, digests and metadata together. Where even the least file is larger, the cell says so.
* "none" has the scale 1/keep. "parallel" computes one per tensor from the delta, and "learned" learns one per tensor,
  on the hidden states, or the logits, of 128 unlabelled training inputs, none of which was trained on.
* The validation split is only scored. The share of the gain is of sums over the seeds, with its standard error.

A second table shows where the bytes of the files with learned scales are; `bench.small_files` compares the codes of
what is no matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import dtrain
from bench.cells import (
    INPUTS,
    caption,
    chosen,
    compressed,
    describe,
    figure,
    fill,
    greatest_keep,
    parser_for,
    scored,
    share,
    show,
    show_share,
    task_of,
)
from bench.record import Cell, Job, Results, read_results
from bench.tasks import TASKS, Task

RATIOS = (1000, 2000, 5000)
NAMES = ("sst2", "subj", "cifar")
FITS: dict[str, tuple[str, dtrain.Fit | None]] = {  # by label: the objective and the fit
    "none": ("hidden", None),
    "parallel": ("hidden", dtrain.ClosedForm("parallel")),
    "learned": ("hidden", dtrain.Learn(steps=50)),
    "learned, logits": ("logits", dtrain.Learn(steps=50)),
}
KEEP = 1 / 32  # where it does not matter
SHOWN = "learned"  # in the second table
HEADER = (
    "task",
    "fit",
    "smaller",
    "seeds",
    "file bytes",
    "keep",
    "score",
    "gain kept over base",
    "over probe",
    "hidden change",
    "processor s",
)
KINDS = ("matrix", "embedding", "vector", "token", "buffer", "fresh")


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells in the order in which they are measured: fit by fit, then ratio by ratio."""
    for label, ratio, seed, name in product(FITS, RATIOS, seeds, names):
        yield ratio_job(name, seed, shared, ratio, label)


def ratio_job(name: str, seed: int, shared: Path, ratio: int, label: str) -> Job:
    objective, fit = FITS[label]

    def measure() -> Cell:
        task = task_of(name, seed, shared)
        return fitted(task, ratio, objective, fit)

    settings = {"ratio": ratio, "fit": describe(fit), "objective": objective, "inputs": INPUTS}
    return Job(key(name, seed, ratio, label), settings, measure, ((name, seed),))


def fitted(task: Task, ratio: int, objective: str, fit: dtrain.Fit | None) -> Cell:
    """Return one cell: of the greatest file that is small enough, or what the least one takes."""
    method, encode = (
        partial(dtrain.SeededSign, seed=task.seed, q="keep"),
        partial(dtrain.compress, task.base, task.tuned),
    )
    first = encode(method(keep=KEEP))
    most = first.report().checkpoint_bytes // ratio
    spare = 0
    if fit is not None:  # what the file says of a fit; a few bytes more for figures of other lengths
        short = replace(fit, steps=1) if isinstance(fit, dtrain.Learn) else fit
        told = compressed(task, method(keep=KEEP), short, objective, 2)[0]
        spare = told.file_bytes() - first.file_bytes() + 32
    keep = greatest_keep(lambda keep: encode(method(keep=keep)).file_bytes() + spare, most)
    if keep is None:
        least = encode(method(keep=2**-20))
        size = least.file_bytes() + spare
        reason = f"with next to no weight kept the file has {size} bytes, and {most} are allowed"
        return {"refused": reason, "report": least.report().as_dict()}
    delta, cell = compressed(task, method(keep=keep), fit, objective)
    if delta.file_bytes() > most:
        raise dtrain.InputError(
            f"the file has {delta.file_bytes()} bytes, expected at most {most}: {spare} for the fit were too few."
        )
    return {"keep": keep, "most": most, **cell, **scored(task, delta), "report": delta.report().as_dict()}


def key(name: str, seed: int, ratio: int, label: str) -> str:
    return f"{name} | {ratio} | {seed} | {label}"


def found(results: Results, name: str, ratio: int, label: str) -> list[tuple[Cell, Cell]]:
    """Return the cells of all seeds, each with the references of its seed."""
    pairs: list[tuple[Cell, Cell]] = []
    for reference, scores in results["references"].items():
        task, seed = reference.split(" | ")
        cell = results["cells"].get(key(name, int(seed), ratio, label), {})
        if task == name and cell:
            pairs.append((cell, scores))
    return pairs


def ratio_rows(results: Results) -> list[list[str]]:
    out: list[list[str]] = []
    for name, ratio, label in product(NAMES, RATIOS, FITS):
        pairs = found(results, name, ratio, label)
        if any("refused" in cell for cell, _ in pairs):
            least = fmean(cell["report"]["file_bytes"] for cell, _ in pairs)
            out.append([name, label, f"{ratio:,}x", str(len(pairs)), f"{least:,.0f} at least", *["-"] * 6])
        elif pairs:
            out.append([name, label, f"{ratio:,}x", *figures(pairs)])
    return out


def figures(pairs: Sequence[tuple[Cell, Cell]]) -> list[str]:
    def gain_kept(floor: str) -> str:
        kept = [cell["score"] - scores[floor] for cell, scores in pairs]
        return show_share(share(kept, [scores["fine-tuned"] - scores[floor] for _, scores in pairs]))

    def mean(field: str, style: str) -> str:
        return format(fmean(cell[field] for cell, _ in pairs), style)

    return [
        str(len(pairs)),
        mean("file_bytes", ",.0f"),
        mean("keep", ".4g"),
        figure([cell["score"] for cell, _ in pairs]),
        gain_kept("base"),
        gain_kept("linear probe"),
        mean("hidden_change", ".4f"),
        mean("seconds", ".0f"),
    ]


def bytes_rows(results: Results) -> list[list[str]]:
    """Return payload bytes by kind of tensor, the rest of the file and all of it: means over the seeds."""
    out: list[list[str]] = []
    for name, ratio in product(NAMES, RATIOS):
        cells = [cell for cell, _ in found(results, name, ratio, SHOWN)]
        if not cells:
            continue
        rows = [[(row["kind"], row["payload_bytes"]) for row in cell["report"]["rows"]] for cell in cells]
        known = [fmean(sum(size for found, size in part if found == kind) for part in rows) for kind in KINDS]
        whole = fmean(cell["report"]["file_bytes"] for cell in cells)
        sizes = [f"{size:,.0f}" for size in (*known, whole - sum(known), whole)]
        out.append([name, f"{ratio:,}x", str(len(cells)), *sizes])
    return out


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, nargs="+", default=NAMES)
    arguments = parser.parse_args()
    out = arguments.out or Path("bench/results/ratios.json")
    if not arguments.table:
        todo = jobs(arguments.task, arguments.seeds, arguments.shared)
        fill(out, chosen(todo, arguments.only), arguments.shared)
    results = read_results(out)
    if not results["references"]:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    show(HEADER, ratio_rows(results), caption(results), arguments.markdown)
    header = ("task", "smaller", "seeds", *KINDS, "manifest", "file")
    note = f"payload bytes by kind of tensor, {SHOWN}, means over the seeds"
    show(header, bytes_rows(results), note, arguments.markdown)


if __name__ == "__main__":
    main()
