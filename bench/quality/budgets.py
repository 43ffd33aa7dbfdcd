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


def greatest_knob(
    size: Callable[[float], int],
    most: int,
    low: float,
    high: float,
    known: dict[float, int] | None = None,
    tries: int = 12,
) -> float | None:
    """Return a knob whose file, of `size(knob)` bytes, has `most` bytes or fewer, and nearly as many.

    The bytes grow with the knob, next to linearly for most methods, so the next knob tried is where a straight line
    through the nearest two sizes meets the budget. It ends within 1 % of the budget, or after `tries`.

    Args:
        size: Returns the bytes at a knob.
        most: The budget.
        low: Least knob.
        high: Greatest knob.
        known: Sizes that are known already, which is added to.
        tries: The most that are made between the least and the greatest knob.

    Returns:
        The knob; None where not even the file at `low` is small enough.
    """
    sizes = {} if known is None else known

    def at(knob: float) -> int:
        if knob not in sizes:
            sizes[knob] = size(knob)
        return sizes[knob]

    if at(low) > most:
        return None
    if high <= low or at(high) <= most:
        return high
    low = max(knob for knob, found in sizes.items() if found <= most)
    high = min(knob for knob, found in sizes.items() if found > most and knob > low)
    least, largest = sizes[low], sizes[high]
    best, filled = low, least
    for turn in range(tries):
        if filled >= (1 - CLOSE) * most or high / low < 1.0005:
            break
        middle = low + (high - low) * ((1 - CLOSE / 2) * most - least) / (largest - least)
        if turn % 3 == 2 or not low < middle < high:  # a line through points far apart may creep
            middle = math.sqrt(low * high)
        middle = float(f"{middle:.5g}")  # few digits: the file holds them
        found = at(middle)
        if found <= most:
            low, least = middle, found
            if found > filled:
                best, filled = middle, found
        else:
            high, largest = middle, found
    return best
