"""JSON files of cells that a run picks up where it stopped. It imports little, for processes that measure memory."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.artifact.atomic import write_atomic

Cell = dict[str, Any]
Results = dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Job:
    """One cell to measure.

    Args:
        key: Its name among the cells of a file.
        settings: What it depends on, as it reads back from a JSON file; it is measured anew once this changes.
        measure: Returns the cell, without its settings.
        tasks: The tasks, by name and seed, whose references belong to it.
    """

    key: str
    settings: dict[str, Any]
    measure: Callable[[], Cell]
    tasks: tuple[tuple[str, int], ...] = ()


def read_results(out: Path) -> Results:
    return json.loads(out.read_text()) if out.exists() else {"references": {}, "cells": {}}


def fill(
    out: Path, jobs: Iterable[Job], references: Callable[[Job], dict[str, Cell]] | None = None, again: bool = False
) -> None:
    """Measure the cells that `out` does not have, in the order given, and write it after each.

    Args:
        out: The file.
        jobs: The cells.
        references: Returns what else belongs into the file once a job is done.
        again: Measure the cells that are there, too.
    """
    for job in jobs:
        if not again and read_results(out)["cells"].get(job.key, {}).get("settings") == job.settings:
            continue
        found = job.measure()
        beside = {} if references is None else references(job)
        with alone(out.parent):
            results = read_results(out)  # another run may have written meanwhile
            if beside:
                results["references"] |= beside
            results["cells"][job.key] = {"settings": job.settings, **found}
            write_json(out, results)
        sys.stderr.write(f"{out.stem} | {job.key}: {found}\n")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from writing results into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # which unlocks it


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [(json.dumps(value, indent=1) + "\n").encode()])
