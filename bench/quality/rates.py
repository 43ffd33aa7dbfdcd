"""Learning rates of the adapters, found on training batches alone.

    python -m bench.quality.rates --task digits sst2

Every adapter is trained at seed 0 and rank 2 for a quarter of the steps at five rates; the one with the least loss on
the last fifth of its training batches is taken (SST-2 and CIFAR-10 see every batch once, so that is a loss on batches
not yet trained on; digits are shifted anew every time). Digits decide for vision, SST-2 for text. One JSON cell per
(task, adapter, rate), in `bench/results/quality/rates.json`, which `bench.quality` reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from bench.cells import Cell, Job, chosen, fill, parser_for, task_of
from bench.quality.adapters import ADAPTERS, TRIED
from bench.quality.jobs import TASKS

CANDIDATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RANK, PART = 2, 4


def jobs(names: Sequence[str], shared: Path) -> Iterator[Job]:
    for name, label, rate in product(names, ADAPTERS, CANDIDATES):
        yield job(name, shared, label, rate)


def job(name: str, shared: Path, label: str, rate: float) -> Job:
    def run() -> Cell:
        task, adapter = task_of(name, 0, shared), ADAPTERS[label]
        if task.training is None:
            raise ValueError(f"how {name} was fine-tuned is not known.")
        model = adapter.wrap(task, RANK)
        return {"loss": adapter.learn(task, model, rate, task.training.steps // PART)}

    settings = {"rate": rate, "rank": RANK, "part": PART, "only": list(ADAPTERS[label].only)}
    return Job(f"{name} | {label} | {rate:g}", settings, run, ((name, 0),))


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, nargs="+", default=["digits", "sst2"])
    arguments = parser.parse_args()
    fill(arguments.out or TRIED, chosen(jobs(arguments.task, arguments.shared), arguments.only), arguments.shared)


if __name__ == "__main__":
    main()
