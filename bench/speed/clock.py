"""Take steps and say how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator

from bench.speed.contenders import Steps

Seconds = tuple[float, float]


def timed(steps: Steps[object]) -> Iterator[tuple[str, Seconds]]:
    """Yield every step that counts with its seconds and its processor seconds."""
    start = now()
    for step in steps:
        stop = now()
        if step is not None:
            yield step, (round(stop[0] - start[0], 6), round(stop[1] - start[1], 6))
        start = now()


def now() -> Seconds:
    return time.perf_counter(), time.process_time()
