"""Quality at equal bytes: dtrain against peers, on real tasks, at the same budgets of bytes on disk.

    python -m bench.quality --task cifar sst2 subj digits cola --seeds 0 1 2 --shared ../shared
    python -m bench.quality --only "SeededSign" "0.06"               # cells with one of these in their key

One JSON file per task in `bench/results/quality`, one cell per (seed, budget, entry); it picks up where it stopped, and
measures a cell anew once its settings have changed. `python -m bench.report` makes tables and plots of what is there.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from bench.cells import Job, chosen, fill, parser_for
from bench.quality.jobs import TASKS, jobs

OUT = Path("bench/results/quality")


def task_name(job: Job) -> str:
    return job.tasks[0][0]


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, nargs="+", default=TASKS)
    arguments = parser.parse_args()
    out = arguments.out or OUT
    todo = chosen(jobs(arguments.task, arguments.seeds, arguments.shared), arguments.only)
    for name, group in groupby(todo, key=task_name):
        fill(out / f"{name}.json", group, arguments.shared)


if __name__ == "__main__":
    main()
