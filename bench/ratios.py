"""`SeededSign` with learned scales at 1000x, 2000x and 5000x smaller than the checkpoint, every byte counted.

    python -m bench.ratios --task sst2 subj cifar --seeds 0 1 2 --shared ../shared
    python -m bench.ratios --table --markdown                        # only show what has been measured

One JSON cell per (task, ratio, seed, fit); it picks up where it stopped.

* The keep rate is the greatest whose file has at most the bytes of the fine-tuned checkpoint over the ratio: payloads,
  scales, names, digests and metadata together. Where even the least file is larger, the cell says so.
* "none" has the scale 1/keep, "norm" the match of norms. From there scales are learnt, one per tensor, on 256
  unlabelled training inputs, by hidden states or by logits. None of the sentences was trained on; of the images the
  first 128 were, and the others, by which learning stops, were not.
* The validation split is only scored. The share of the gain is of sums over the seeds, with its standard error.

A second table compares, at one keep rate and without fitting, the bytes by kind of tensor and the score under the
default rules and under those of before: embeddings compressed, norms and biases in half precision, the head exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import dtrain
from bench.cells import (
    INPUTS,
    Cell,
    Job,
    Results,
    caption,
    chosen,
    compressed,
    describe,
    figure,
    fill,
    greatest_keep,
    parser_for,
    plain,
    read_results,
    scored,
    share,
    show,
    show_share,
    task_of,
)
from bench.tasks import TASKS, Task

RATIOS = (1000, 2000, 5000)
NAMES = ("sst2", "subj", "cifar")
FITS: dict[str, tuple[str, dtrain.Learn | None]] = {  # by label: the objective and the fit
    "none": ("hidden", None),
    "norm": ("hidden", None),
    "learned": ("hidden", dtrain.Learn()),
    "learned, logits": ("logits", dtrain.Learn()),
}
RULES = {
    "before": dtrain.Rules(embeddings=(), vectors="float16", fresh="exact"),
    "default": dtrain.Rules(),
}
KEEP = 1 / 32  # of the second table
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
KINDS = ("method", "vector", "half", "whole", "bits", "drop", "same")


def method_for(label: str, keep: float, seed: int) -> dtrain.SeededSign:
    return dtrain.SeededSign(keep=keep, seed=seed, q="keep" if label == "none" else "norm")


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells in the order in which they are measured: bytes by kind of tensor, then ratio by ratio."""
    for name in names:
        for seed in seeds:
            for label in RULES:
                yield bytes_job(name, seed, shared, label)
    for ratio in RATIOS:
        for seed in seeds:
            for name in names:
                for label in FITS:
                    yield ratio_job(name, seed, shared, ratio, label)


def bytes_job(name: str, seed: int, shared: Path, label: str) -> Job:
    method = method_for("norm", KEEP, seed)

    def measure() -> Cell:
        task = task_of(name, seed, shared)
        delta, cell = compressed(task, method, rules=RULES[label])
        return {**cell, **scored(task, delta), "report": delta.report().as_dict()}

    settings = {"method": plain(method.describe()), "rules": label}
    return Job(f"{name} | rules {label} | {seed}", settings, measure, ((name, seed),))


def ratio_job(name: str, seed: int, shared: Path, ratio: int, label: str) -> Job:
    objective, fit = FITS[label]

    def measure() -> Cell:
        task = task_of(name, seed, shared)
        return fitted(task, ratio, label, objective, fit)

    settings = {"ratio": ratio, "fit": describe(fit), "objective": objective, "inputs": INPUTS}
    return Job(key(name, seed, ratio, label), settings, measure, ((name, seed),))


def fitted(task: Task, ratio: int, label: str, objective: str, fit: dtrain.Learn | None) -> Cell:
    """Return one cell: of the greatest file that is small enough, or what the least one takes."""
    method, encode = partial(method_for, label, seed=task.seed), partial(dtrain.compress, task.base, task.tuned)
    first = encode(method(KEEP))
    most = first.report().checkpoint_bytes // ratio
    spare = 0
    if fit is not None:  # what the file says of a fit; a few bytes more for figures of other lengths
        told = compressed(task, method(KEEP), replace(fit, steps=1), objective, 2)[0]
        spare = told.file_bytes() - first.file_bytes() + 32
    keep = greatest_keep(lambda keep: encode(method(keep)).file_bytes() + spare, most)
    if keep is None:
        least = encode(method(2**-20))
        size = least.file_bytes() + spare
        reason = f"with next to no weight kept the file has {size} bytes, and {most} are allowed"
        return {"refused": reason, "report": least.report().as_dict()}
    delta, cell = compressed(task, method(keep), fit, objective)
    if delta.file_bytes() > most:
        raise dtrain.InputError(
            f"the file has {delta.file_bytes()} bytes, expected at most {most}: {spare} for the fit were too few."
        )
    return {"keep": keep, "most": most, **cell, **scored(task, delta), "report": delta.report().as_dict()}


def key(name: str, seed: int, ratio: int, label: str) -> str:
    return f"{name} | {ratio} | {seed} | {label}"


def found(results: Results, name: str, key_of: Any) -> list[tuple[Cell, Cell]]:
    """Return the cells of a task with the references of their seeds."""
    pairs: list[tuple[Cell, Cell]] = []
    for reference, scores in results["references"].items():
        task, seed = reference.split(" | ")
        cell = results["cells"].get(key_of(int(seed)), {})
        if task == name and cell:
            pairs.append((cell, scores))
    return pairs


def ratio_rows(results: Results) -> list[list[str]]:
    out: list[list[str]] = []
    for name in NAMES:
        for label in FITS:
            for ratio in RATIOS:
                pairs = found(results, name, lambda seed, n=name, r=ratio, f=label: key(n, seed, r, f))
                if any("refused" in cell for cell, _ in pairs):
                    out.append([name, label, f"{ratio:,}x", str(len(pairs)), "does not fit", *["-"] * 6])
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
    """Return payload bytes by kind of tensor, the rest of the file, all of it, and the score: means over the seeds."""
    out: list[list[str]] = []
    for name in NAMES:
        for label in RULES:
            pairs = found(results, name, lambda seed, n=name, r=label: f"{n} | rules {r} | {seed}")
            if pairs:
                out.append([name, label, *kinds([cell for cell, _ in pairs])])
    return out


def kinds(cells: Sequence[Cell]) -> list[str]:
    by_kind = [{row["kind"]: row["payload_bytes"] for row in cell["report"]["rows"]} for cell in cells]
    known = [fmean(rows.get(kind, 0) for rows in by_kind) for kind in KINDS]
    whole = fmean(cell["file_bytes"] for cell in cells)
    sizes = [f"{size:,.0f}" for size in (*known, whole - sum(known), whole)]
    return [str(len(cells)), *sizes, figure([cell["score"] for cell in cells])]


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
    header = ("task", "rules", "seeds", *KINDS, "manifest", "file", "score")
    note = (
        f"payload bytes by kind of tensor, SeededSign(keep=1/{1 / KEEP:g}) with the norm matched, means over the seeds"
    )
    show(header, bytes_rows(results), note, arguments.markdown)


if __name__ == "__main__":
    main()
