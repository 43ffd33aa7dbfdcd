"""Budgets of bytes on disk, and the greatest knob whose file is within one."""

from __future__ import annotations

import math
from collections.abc import Callable

from bench.tasks import State, Task

#: Bits of file per parameter of the checkpoint.
BUDGETS = (1.0, 0.25, 0.06, 0.03, 0.015)
CLOSE = 0.01  # share of the budget that may be left over


def parameters(state: State) -> int:
    return sum(tensor.numel() for tensor in state.values())


def bytes_allowed(task: Task, budget: float) -> int:
    return int(budget * parameters(task.tuned) / 8)


def greatest_knob(size: Callable[[float], int], most: int, low: float, high: float, tries: int = 12) -> float | None:
    """Return a knob whose file, of `size(knob)` bytes, has `most` bytes or fewer, and nearly as many.

    The bytes grow with the knob, next to linearly for most methods, so the next knob tried is where a straight line
    through the nearest two sizes meets the budget. It ends within 1 % of the budget, or after `tries`.

    Returns:
        The knob; None where not even the file at `low` is small enough.
    """
    least = size(low)
    if least > most:
        return None
    if high <= low or (largest := size(high)) <= most:
        return high
    best, filled = low, least
    for turn in range(tries):
        if filled >= (1 - CLOSE) * most or high / low < 1.0005:
            break
        middle = low + (high - low) * ((1 - CLOSE / 2) * most - least) / (largest - least)
        if turn % 3 == 2 or not low < middle < high:  # a line through points far apart may creep
            middle = math.sqrt(low * high)
        middle = float(f"{middle:.5g}")  # few digits: the file holds them
        found = size(middle)
        if found <= most:
            low, least = middle, found
            if found > filled:
                best, filled = middle, found
        else:
            high, largest = middle, found
    return best
