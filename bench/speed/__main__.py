"""`python -m bench.speed`: see the package."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import bench.speed
from bench.cells import chosen, fill
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
    parser.add_argument("--threads", type=int, default=1)
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
    cells = jobs(dtype, size, arguments.threads, peers=not arguments.without_peers)
    fill(file_of(dtype, size), chosen(cells, arguments.only), Path())
    shutil.rmtree(MODELS / f"{dtype}-{size}", ignore_errors=True)


if __name__ == "__main__":
    main()
