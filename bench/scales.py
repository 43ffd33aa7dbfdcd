"""Ways to fit the scales, on three hosts at two budgets each and at equal bytes: score, objective, seconds.

    python -m bench.scales --task sst2 --seeds 0 1 2 --shared ../shared
    python -m bench.scales --task sst2 --table --markdown            # only show what has been measured

One JSON cell per (budget, seed, host, fit); it picks up where it stopped. What costs little and tells most comes first.

* Hosts at equal bits: `DareX` keeps 16 bits of 1/16 as many weights as `SeededSign` keeps one bit of. Every fit is a
  number per tensor, which the file holds anyway; files of one host differ by the bytes in which they say what was
  fitted. `BitDelta` has the budgets "all" and "half": without its embeddings (MiniLM), or without the first three of
  six blocks (ViT). The rules are the defaults, so embeddings stay at the base, but for BitDelta's budget "all".
* All fits start from the scale of "none": 1/keep, for BitDelta the mean magnitude. "parallel" is a closed form.
* `Dbms` holds two payloads of half the host's rate, or a little less, so that its file is not larger than the host's.
  With BitDelta these are of `SeededSign`. "DBMS own" searches its two scalars; "lam 1, eta 1", "eta only" and "lam
  only" are its ablation at the same bytes.
* Learning sees 128 unlabelled training inputs in batches of 32, and stops by the last of them; the searches see the
  last 32. All compare hidden states. None of the inputs was trained on. The validation split is only scored. Seconds
  are of the whole `dtrain.compress` on one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    plain,
    scored,
    show,
    task_of,
)
from bench.record import Cell, Job, Results, read_results
from bench.tasks import TASKS, Task

SOME, FEW = 4, 1  # batches that scales are learnt from, and that the searches look at up to hundreds of times
RATES = {"0.16 bit": 0.16, "0.04 bit": 0.04}  # bits per weight
HALF = {  # what BitDelta leaves at the base for its smaller budget; for MiniLM the default rules say it
    "cifar": dtrain.Rules(drop=("blocks.[012].attn.*.weight", "blocks.[012].mlp.*.weight")),
}
EVERYTHING = dtrain.Rules(embeddings=())
ABLATED = ("0.04 bit", "all")
HEADER = (
    "budget",
    "host",
    "fit",
    "seeds",
    "file bytes",
    "score",
    "less none's",
    "hidden change",
    "objective, start",
    "end",
    "processor s",
    "wall s",
)


@dataclass(frozen=True)
class Way:
    """One way to fit.

    Args:
        label: Its name in the table.
        fit: What fits the scales; None for the method's own.
        dbms: Arguments of a `Dbms` around the host, where there is one.
        objective: What is compared.
        batches: How many batches of inputs are used; None for all.
    """

    label: str
    fit: dtrain.Fit | None = None
    dbms: dict[str, Any] | None = None
    objective: str = "hidden"
    batches: int | None = None


NONE = Way("none")
BOTH = dtrain.Search()  # lam on a grid, eta by golden section at each of its points
#: From what costs little and tells most to what costs much: all budgets and seeds of one group before the next.
GROUPS = (
    (
        NONE,
        Way("parallel", dtrain.ClosedForm("parallel"), batches=FEW),
        Way("global q", dtrain.Search(), batches=FEW),
        Way("learned", dtrain.Learn(steps=40), batches=SOME),
        Way("DBMS own", BOTH, {}, batches=FEW),
    ),
    (Way("per-layer q", dtrain.Search(per="tensor"), batches=FEW),),
    (
        Way("DBMS, lam 1, eta 1", None, {"lam": 1.0, "eta": 1.0}),
        Way("DBMS, eta only", BOTH, {"lam": 1.0}, batches=FEW),
        Way("DBMS, lam only", BOTH, {"eta": 1.0}, batches=FEW),
    ),
)
ABLATION = GROUPS[2]


def hosts(name: str, seed: int) -> Iterator[tuple[str, dtrain.Method, dtrain.Rules | None]]:
    """Yield budget, host with the scale 1/keep, and rules."""
    for budget, bits in RATES.items():
        yield budget, dtrain.DareX(keep=bits / 16, seed=seed, q="keep"), None
        yield budget, dtrain.SeededSign(keep=bits, seed=seed, q="keep"), None
    yield "all", dtrain.BitDelta(), EVERYTHING
    yield "half", dtrain.BitDelta(), HALF.get(name)


def jobs(name: str, seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells, in the order in which they are measured."""
    for ways in GROUPS:
        budgets = dict.fromkeys(budget for budget, _, _ in hosts(name, 0))
        for budget, seed, way in ((b, s, w) for b in budgets for s in seeds for w in ways):
            for this, host, rules in hosts(name, seed):
                if this == budget and (way not in ABLATION or budget in ABLATED):
                    yield job(name, seed, shared, budget, host, rules, way)


def job(
    name: str, seed: int, shared: Path, budget: str, host: dtrain.Method, rules: dtrain.Rules | None, way: Way
) -> Job:
    settings = {
        "host": plain(host.describe()),
        "fit": describe(way.fit),
        "dbms": way.dbms,
        "objective": way.objective,
        "batches": way.batches,
        "inputs": INPUTS,
    }

    def measure() -> Cell:
        task = task_of(name, seed, shared)
        try:
            method = host if way.dbms is None else shifted(task, host, way.dbms, rules)
            delta, cell = compressed(task, method, way.fit, way.objective, way.batches, rules=rules)
        except dtrain.InputError as error:
            return {"refused": str(error)}
        return {**cell, **scored(task, delta)}

    return Job(key(seed, budget, host, way.label), settings, measure, ((name, seed),))


def shifted(task: Task, host: dtrain.Method, arguments: dict[str, Any], rules: dtrain.Rules | None) -> dtrain.Method:
    """Return `Dbms` around a host of as high a rate as gives a file not larger than the host's."""
    inner = dtrain.SeededSign(seed=task.seed) if isinstance(host, dtrain.BitDelta) else host
    size = partial(dtrain.compress, task.base, task.tuned, rules=rules)
    most = size(host).file_bytes()
    nominal = getattr(host, "keep", 1.0)

    def bytes_at(keep: float) -> int:
        return size(dtrain.Dbms(replace(inner, keep=keep), lam=1.0, eta=1.0)).file_bytes()

    keep = greatest_keep(bytes_at, most, 0.8 * nominal, nominal)
    if keep is None:
        raise dtrain.InputError(f"two payloads at 0.8 of {host} take more bytes than the host's one.")
    return dtrain.Dbms(replace(inner, keep=keep), **arguments)


def key(seed: int, budget: str, host: dtrain.Method, label: str) -> str:
    return f"{budget} | {seed} | {type(host).__name__} | {label}"


def rows(name: str, results: Results) -> list[list[str]]:
    labels = [way.label for ways in GROUPS for way in ways]
    out: list[list[str]] = []
    for budget, host, _ in hosts(name, 0):
        out += [line for label in labels if (line := row(results, budget, host, label)) is not None]
    return out


def row(results: Results, budget: str, host: dtrain.Method, label: str) -> list[str] | None:
    """Return one row: means over the seeds, and differences to "none" at the same seeds."""
    seeds = [int(reference.split(" | ")[1]) for reference in results["references"]]
    pairs = [
        (cells(results, seed, budget, host, label), cells(results, seed, budget, host, NONE.label)) for seed in seeds
    ]
    found = [(cell, none) for cell, none in pairs if "score" in cell]
    if not found:
        return None
    first = [cell for cell, _ in found]
    both = [(cell["score"], none["score"]) for cell, none in found if "score" in none]
    fits = [cell["fit"] or {} for cell in first]

    def mean(values: Sequence[float | None], style: str) -> str:
        known = [value for value in values if value is not None]
        return format(fmean(known), style) if len(known) == len(values) else "-"

    return [
        budget,
        type(host).__name__,
        label,
        str(len(found)),
        mean([cell["file_bytes"] for cell in first], ",.0f"),
        figure([cell["score"] for cell in first]),
        "-" if label == NONE.label or not both else difference(*zip(*both, strict=True)),
        mean([cell["hidden_change"] for cell in first], ".4f"),
        mean([fit.get("start") for fit in fits], ".4f"),
        mean([fit.get("loss") for fit in fits], ".4f"),
        mean([cell["seconds"] for cell in first], ".0f"),
        mean([cell["wall_seconds"] for cell in first], ".0f"),
    ]


def cells(results: Results, seed: int, budget: str, host: dtrain.Method, label: str) -> Cell:
    return results["cells"].get(key(seed, budget, host, label), {})


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, required=True)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"bench/results/scales_{arguments.task}.json")
    if not arguments.table:
        todo = jobs(arguments.task, arguments.seeds, arguments.shared)
        fill(out, chosen(todo, arguments.only), arguments.shared)
    results = read_results(out)
    if not results["references"]:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    show(HEADER, rows(arguments.task, results), caption(results), arguments.markdown, left=3)


if __name__ == "__main__":
    main()
