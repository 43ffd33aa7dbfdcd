"""The fuzzer of `bench.fuzz`, guided by coverage; atheris is no dependency: `pip install atheris`.

    python -m bench.fuzz_guided --seconds 600

The bytes that atheris chooses are what every draw of the mutator is made of, so its inputs get past the checksums too.
What it keeps lies in runs/fuzz/atheris; a finding stops it, and lies beside it as crash-*.
"""

from __future__ import annotations

import argparse
import sys
import time

import atheris

with atheris.instrument_imports(include=["dtrain"]):
    import dtrain.artifact
    import dtrain.cli.outcome
    import dtrain.delta
    import dtrain.runtime  # noqa: F401

import torch

from bench.fuzz import FOLDER, Bytes, Tally, limit, run
from tests.artifact import mutations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    tally, corpus, since = Tally(FOLDER / "atheris.json"), FOLDER / "atheris", [time.monotonic()]
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(100):  # else it would begin with the shortest inputs, which bend one file only
        (corpus / f"start_{number}").write_bytes(mutations.seeded(0, number).randbytes(100))
    limit()

    def one(data: bytes) -> None:
        rng = Bytes(data)
        run(*mutations.case(rng)[1:], rng, tally)
        tally.index += 1
        if (now := time.monotonic()) - since[0] > 10:
            tally.seconds, since[0] = tally.seconds + now - since[0], now
            tally.save()

    options = [
        f"-max_total_time={seconds}",
        "-max_len=300",
        "-len_control=0",
        "-timeout=60",
        f"-artifact_prefix={FOLDER}/",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
