"""`python -m bench.speed`: see the package."""

from __future__ import annotations

import argparse
import shutil
import sys

import bench.speed
from bench.record import fill
from bench.speed.measure import MODELS, jobs
from bench.speed.pairs import SIZES
from bench.speed.peers import FOLDER
from bench.speed.plot import draw
from bench.speed.tables import PAIRS, file_of, markdown


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=bench.speed.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="measure cells with a word in their key")
    parser.add_argument("--threads", type=int, default=1, help="of every measuring process")
    parser.add_argument("--rounds", type=int, default=5, help="the most that are made; large models take fewer")
    parser.add_argument("--without-peers", action="store_true", help="measure dtrain, safetensors and torch only")
    parser.add_argument("--again", action="store_true", help="measure what is there, too")
    parser.add_argument("--table", action="store_true", help="measure nothing, show what is there")
    arguments = parser.parse_args()
    if not (arguments.table or arguments.without_peers or FOLDER.exists()):
        parser.error(f"{FOLDER} does not exist. Install the other tools as --help says, or give --without-peers.")
    return arguments


def main() -> None:
    arguments = parse()
    if not arguments.table:
        for dtype, size in PAIRS:
            if size in arguments.sizes:
                measure(dtype, size, arguments)
        draw()
    sys.stdout.write(markdown())


def measure(dtype: str, size: str, arguments: argparse.Namespace) -> None:
    cells = jobs(dtype, size, arguments.threads, not arguments.without_peers, arguments.rounds)
    wanted = [job for job in cells if not arguments.only or any(word in job.key for word in arguments.only)]
    fill(file_of(dtype, size), wanted, again=arguments.again)
    shutil.rmtree(MODELS / f"{dtype}-{size}", ignore_errors=True)


if __name__ == "__main__":
    main()
