"""Fine-tune what the cache does not have, and say how good it is."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import bench.tasks
from bench.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=bench.tasks.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=TASKS, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    arguments = parser.parse_args()
    for name, seed in product(arguments.task, arguments.seeds):
        task = TASKS[name](arguments.shared, seed)
        sys.stderr.write(f"{task.name} {seed}: {task.references}\n")


if __name__ == "__main__":
    main()
