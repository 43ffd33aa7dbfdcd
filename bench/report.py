"""RESULTS.md, its plots and the README's table, made of what has been measured: `python -m bench.report`.

Nothing in them is written by hand but what the texts below say of the setting. The README's table stands between
`<!-- results -->` and `<!-- /results -->`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import bench.speed.tables
from bench.quality import adamr, pareto, tables
from bench.quality.budgets import BUDGETS
from bench.quality.entries import CHOSEN
from bench.quality.found import Found, Side

START, END = "<!-- results -->", "<!-- /results -->"
DETAILS = Path("docs/results")
SEEDS = 3  # of what is shown in the README

HEAD = f"""# Results

Made by `python -m bench.report` from `bench/results/`; `make bench` measures what is missing, `make bench-check`
measures a seeded sample of it again. Two cores of a shared machine, no GPU.

## Quality at equal bytes

Every size is that of the files on disk, and a budget is bits of file per parameter of the checkpoint: 1 bit is 32x
smaller than float32, 0.015 is 2133x. Each entry has one knob (a keep rate, bits, a rank), within 1 % of the bytes of
the greatest that fits, where it has no steps; a peer without a knob is admitted where its file exceeds the budget by a
tenth at most.

* **Chosen in advance**: `{CHOSEN}`, one bit for one weight in 1/keep at seeded positions, and a closed form for
  the scale of every tensor that needs no labels. It has been the same since the first of these results; an earlier
  experiment, `bench.ratios`, had seen sst2, subj and cifar at other sizes, none had seen digits or word_order.
* "Best of n of N" is the best of n entries *by its validation score*, a selection on evaluation data, which flatters
  it: it is made against us (the best peer is compared with the entry chosen in advance), and shown for ours. N counts
  those too that have fewer seeds than these n, or have not been measured there; one with fewer seeds that is further
  ahead is named beside it.
* **Peers** are run from their packages and read back from their own files: `deltatensors` 0.2.0, `sparse-llm` 0.0.5,
  `mergekit` 0.1.5, `zipnn` 0.5.4, `zstandard`; adapters of `peft` 0.21.2, trained on the task's own batches for as
  many steps as the fine-tune; and the floors, biases alone and a linear probe. Where no package writes a file for a
  published method, **dtrain's preset of it** stands in, in dtrain's own file: its bytes are fewer than its authors'.
* Each adapter is trained at two learning rates, and the one with the less training loss counts: the best of six at
  rank 2 (`bench.quality.rates`; cifar takes that of digits, subj and cola that of sst2; what was not tried takes that
  of LoRA on attention), and a third of it. More steps, or a finer search, might lift them. They are saved in float32,
  as peft does; half the bytes a value would give them about twice the rank.
* Fits see 128 unlabelled training inputs. The validation split is only scored. No seed is selected.
* Differences are paired over the seeds (fine-tune, mask and adapter alike), with a 95 % interval of Student's t. With
  n = 3 that is 2.5 standard deviations either way, and says little but whether a difference is larger than the seeds'.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path(), help="the checkout that RESULTS.md and README.md are in")
    root = parser.parse_args().root
    found = tables.load(root / tables.RESULTS)
    for task in found:
        pareto.draw(task, root / DETAILS / f"quality_{task.name}.png")
        (root / DETAILS / f"{task.name}.md").write_text(details(task))
    (root / "RESULTS.md").write_text(results(found))
    readme = root / "README.md"
    readme.write_text(replaced(readme.read_text(), short(found)))


def results(found: Sequence[Found]) -> str:
    """Return RESULTS.md, with what is lost first."""
    parts = [HEAD, "### Where we lose\n", tables.losses(found)]
    for task in found:
        parts += [
            f"### {task.name}: {tables.TITLES.get(task.name, 'a task of your own')}\n",
            f"{tables.references(task)}\n",
        ]
        parts += [tables.headline(task), f"![Score against bytes, {task.name}](docs/results/quality_{task.name}.png)\n"]
        parts += [f"All entries: [docs/results/{task.name}.md](docs/results/{task.name}.md).\n"]
    parts += ["### Lossless, as a share of the checkpoint\n", tables.lossless(found)]
    parts += ["### AdamR: what training costs, and what compression gains\n", adamr.markdown()]
    parts += ["### How much was measured\n", tables.counts(found), gaps(found)]
    return "\n".join([*parts, "## Speed\n", bench.speed.tables.markdown()])


def gaps(found: Sequence[Found]) -> str:
    """Return what the tables do not have yet."""
    lines = [
        f"{task.name} {missing} of {total}" for task in found for missing, total in [tables.missing(task)] if missing
    ]
    return f"Cells not measured yet: {', '.join(lines) or 'none'}. `python -m bench.quality` measures them.\n"


def details(task: Found) -> str:
    """Return the page with all entries of one task."""
    head = f"# {task.name}: {tables.TITLES.get(task.name, 'a task of your own')}\n\nMade by `python -m bench.report`.\n"
    legend = (
        "Means over the seeds, ± standard deviation; shares of the gain ± standard error. `own` is for entries without "
        "a knob. Processor seconds on one thread, of compressing with its fit, or of training an adapter.\n"
    )
    return "\n".join([head, tables.references(task), "", legend, tables.everything(task), tables.refusals(task)]) + "\n"


def short(found: Sequence[Found]) -> str:
    """Return the README's table: of every task with three seeds, what was chosen in advance and the best of others."""
    tasks = [task for task in found if task.gains and any(len(task.at(budget, CHOSEN)) >= SEEDS for budget in BUDGETS)]
    rows: list[list[str]] = []
    for task in tasks:
        rows.append([f"**{task.name}**", *(best(task, budget, None) for budget in BUDGETS)])
        rows += [
            [f"best {name}", *(best(task, budget, side) for budget in BUDGETS)] for side, name in tables.RIVALS.items()
        ]
    head = tables.table(("bit of file per parameter", *(f"{budget:g}" for budget in BUDGETS)), rows)
    lines = [f"* {task.name}, {tables.references(task)}" for task in tasks]
    return "\n".join([head, *lines, ""])


def best(task: Found, budget: float, side: Side | None) -> str:
    """Return the best score of a side at a budget and whose it is, or without a side what the entry chosen has."""
    if side is None:
        return tables.scores(cells) if (cells := task.at(budget, CHOSEN)) else "nothing fits"
    found = task.best(budget, side)
    if found.label is None:
        return tables.named(task, budget, found)
    told = f"{mean(task, budget, found.label)} {found.label} ({found.compared} of {found.possible})"
    return f"{told}; fewer seeds: {mean(task, budget, found.ahead)} {found.ahead}" if found.ahead else told


def mean(task: Found, budget: float, label: str) -> str:
    return f"{fmean(cell['score'] for cell in task.at(budget, label).values()):.3f}"


def replaced(text: str, block: str) -> str:
    """Return `text` with `block` between the two marks, if it has them."""
    if START not in text or END not in text:
        return text
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{block}{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    main()
