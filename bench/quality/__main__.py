"""Quality at equal bytes: dtrain against peers, on real tasks, at the same budgets of bytes on disk.

    python -m bench.quality --task cifar sst2 subj digits word_order cola --seeds 0 1 2 --shared ../shared
    python -m bench.quality --entries "SeededSign" "DeltaDQ" --only "| 0.06 |"     # cells with this in their key
    python -m bench.quality --task my_module:my_task                 # any pair: a function as those of bench.tasks

One JSON file per task in `bench/results/quality`, one cell per (seed, budget, entry); it picks up where it stopped, and
measures a cell anew once its settings have changed. `python -m bench.report` makes tables and plots of what is there.
"""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from bench.cells import chosen, fill, parser_for
from bench.quality.jobs import KINDS, TASKS, jobs
from bench.record import Job

OUT = Path("bench/results/quality")


def task_name(job: Job) -> str:
    return job.tasks[0][0]


def main() -> None:
    parser = parser_for(__doc__, nargs="+", default=TASKS)
    parser.add_argument("--entries", nargs="+", choices=KINDS, default=list(KINDS), metavar="LABEL", help="of these")
    arguments = parser.parse_args()
    out = arguments.out or OUT
    every = jobs(arguments.task, arguments.seeds, arguments.shared)
    todo = (job for job in chosen(every, arguments.only) if job.key.split(" | ", 2)[2] in arguments.entries)
    for name, group in groupby(todo, key=task_name):
        fill(out / f"{name.replace(':', '.')}.json", group, arguments.shared)


if __name__ == "__main__":
    main()
