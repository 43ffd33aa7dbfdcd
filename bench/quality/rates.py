"""Learning rates of the adapters, found on training batches alone.

    python -m bench.quality.rates --task digits sst2 word_order

Every adapter is trained at seed 0 and rank 2, for as many steps as the fine-tune, at six rates; the one with the least
loss on the last fifth of its training batches is taken (SST-2 and CIFAR-10 see every batch once, so that is a loss on
batches not yet trained on; digits are shifted anew every time). CIFAR-10 takes the rates of the digits, SUBJ and CoLA
those of SST-2. One JSON cell per (task, adapter, rate), in `bench/results/quality/rates.json`, for `bench.quality`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from bench.cells import chosen, fill, parser_for, task_of
from bench.quality.adapters import ADAPTERS, TRIED
from bench.record import Cell, Job

CANDIDATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
RANK = 2


def jobs(names: Sequence[str], shared: Path) -> Iterator[Job]:
    for name, label, rate in product(names, ADAPTERS, CANDIDATES):
        yield job(name, shared, label, rate)


def job(name: str, shared: Path, label: str, rate: float) -> Job:
    def run() -> Cell:
        task, adapter = task_of(name, 0, shared), ADAPTERS[label]
        return {"loss": adapter.learn(task, adapter.wrap(task, RANK), rate)}

    settings = {"rate": rate, "rank": RANK, "only": list(ADAPTERS[label].only)}
    return Job(f"{name} | {label} | {rate:g}", settings, run, ((name, 0),))


def main() -> None:
    parser = parser_for(__doc__, nargs="+", default=["digits", "sst2", "word_order"])
    arguments = parser.parse_args()
    fill(arguments.out or TRIED, chosen(jobs(arguments.task, arguments.shared), arguments.only), arguments.shared)


if __name__ == "__main__":
    main()
