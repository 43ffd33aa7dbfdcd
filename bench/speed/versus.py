"""This checkout against another one, say of the commit before a change: ratios of processor seconds.

    git worktree add ../before COMMIT
    python -m bench.speed.versus ../before --what "what was changed"

Processes of both take turns, on one pair of models in bfloat16. The other checkout needs `bench.speed`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.record import write_json
from bench.speed.contenders import MAIN, METHODS
from bench.speed.measure import machine, models
from bench.speed.tables import VERSUS

OPERATIONS = ("write", "read")


def measure(checkout: Path, names: list[str], operation: str, folder: Path) -> dict[str, Any]:
    """Return what a process of one checkout says."""
    task = {"dtype": "bfloat16", "size": "20M", "threads": 1, "operation": operation, "contenders": names, "rounds": 3}
    command = [sys.executable, "-m", "bench.speed.child", json.dumps({**task, "folder": str(folder.resolve())})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout.resolve())}
    output = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=environment, cwd=checkout
    ).stdout
    return json.loads(output)


def main() -> None:
    ours = [contender.name for contender in (*MAIN, *METHODS) if contender.kind == "dtrain"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--what", required=True, help="what was changed since, for the table")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=ours, default=ours, metavar="NAME")
    arguments = parser.parse_args()
    folder, seconds = models("bfloat16", "20M"), {}
    checkouts = [("before", arguments.other), ("after", Path())]
    for turn in range(arguments.turns):
        for operation in OPERATIONS:
            for label, checkout in checkouts[:: 1 if turn % 2 else -1]:  # each is the first at times
                for name, row in measure(checkout, arguments.methods, operation, folder).items():
                    spent = [sum(step[1] for step in steps) for steps in zip(*row["steps"].values(), strict=True)]
                    seconds.setdefault(f"{operation} | {name}", {}).setdefault(label, []).extend(spent)
    write_json(
        VERSUS,
        {"what": arguments.what, "before": commit(arguments.other), "machine": machine(), "seconds": seconds},
    )


def commit(checkout: Path) -> str:
    """Return the commit that a checkout is at."""
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    main()
