"""One cell of dtrain: the greatest file within a budget, how long it took, and how good the model is with it."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cache

import dtrain
from bench.cells import compressed, plain
from bench.quality.budgets import bytes_allowed, greatest_knob, parameters
from bench.quality.entries import Entry
from bench.record import Cell
from bench.tasks import Task

SPARE = 288  # bytes in which a file says what its fit found: 190 to 260, by the figures' lengths


def measure(task: Task, entry: Entry, budget: float | None) -> Cell:
    """Return the cell of one entry, or what its least file takes where that does not fit.

    The budget is None for an entry without a knob.
    """
    most = bytes_allowed(task, 64.0 if budget is None else budget)  # no checkpoint has more than 64 bits a parameter
    spare = SPARE if entry.fit is not None else 0
    calibration = task.calibration() if entry.inputs else None

    @cache
    def size_of(method: dtrain.Method) -> int:
        return dtrain.compress(task.base, task.tuned, method, calibration=calibration).file_bytes() + spare

    def size(knob: float) -> int:
        return size_of(bare(entry.make(knob, task.seed)))

    knob = greatest_knob(size, most, entry.low, entry.high, task.sizes.setdefault(entry.label, {}))
    if knob is None:
        return {"most": most, "refused": f"its least file has {size(entry.low)} bytes, and {most} are allowed"}
    method = entry.make(knob, task.seed)
    if entry.fit is None:
        start = time.process_time()
        delta = dtrain.compress(task.base, task.tuned, method, calibration=calibration)
        cell: Cell = {"seconds": time.process_time() - start, "method": plain(method.describe()), "fit": None}
    else:
        delta, cell = compressed(task, method, entry.fit, entry.objective, entry.batches)
    if delta.file_bytes() > most:
        raise dtrain.InputError(f"{entry.label} has {delta.file_bytes()} bytes where {most} are allowed at most.")
    return {"knob": knob, "most": most, **cell, **point(task, delta.file_bytes()), **scores(task, delta)}


def bare(method: dtrain.Method) -> dtrain.Method:
    """Return the method with the scales of no fit: its files have the same bytes, but for what they say of the fit."""
    if isinstance(method, dtrain.Dbms):
        return replace(method, lam=1.0, eta=1.0)
    return replace(method, q="keep") if getattr(method, "q", "") == "search" else method


def point(task: Task, size: int) -> Cell:
    return {"file_bytes": size, "bits_per_parameter": 8 * size / parameters(task.tuned)}


def scores(task: Task, delta: dtrain.Delta) -> Cell:
    return dict(task.scores(delta.state_dict(task.base)))
