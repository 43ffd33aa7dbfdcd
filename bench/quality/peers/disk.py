"""A peer: what writes files and reads them, and the bytes that lie on disk in between."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import dtrain
from bench.quality.budgets import bytes_allowed, greatest_knob
from bench.quality.measure import point
from bench.record import Cell
from bench.tasks import State, Task
from bench.versions import VERSIONS

#: A peer without a knob is shown at a budget that its file exceeds by a tenth at most: to its favour.
LENIENT = 1.1


@dataclass(frozen=True)
class Peer:
    """One mode of one package.

    Args:
        label: Its name in keys and tables.
        package: Name of the package on the index.
        write: Writes everything that is needed beside the base into a folder, at a knob.
        read: Returns the restored weights from the base and the folder.
        low: Least knob; None where there is none.
        high: Greatest knob.
        whole: Whether the knob is a whole number.
        exact: Whether the weights come back bit for bit, which is then checked instead of scored.
        size: Returns the bytes at a knob without compressing, where compressing is slow.
    """

    label: str
    package: str
    write: Callable[[Task, float, Path], None]
    read: Callable[[Task, Path], State]
    low: float | None = None
    high: float = 1.0
    whole: bool = False
    exact: bool = False
    size: Callable[[Task, float], int] | None = None

    def settings(self) -> dict[str, Any]:
        """Return what a cell depends on, beside its budget."""
        return {**told(self.package), "knob": [self.low, self.high]}

    def measure(self, task: Task, budget: float | None) -> Cell:
        """Return the cell at a budget, or with the only file there is."""
        check_version(self.package)
        if budget is None:
            return self.restored(task, 1.0)
        most, low = bytes_allowed(task, budget), self.low
        if low is None:
            raise TypeError(f"{self.label} has no knob, so it has no budget.")

        def size(knob: float) -> int:
            return self.size(task, rounded(knob)) if self.size else self.written(task, rounded(knob))

        def rounded(knob: float) -> float:
            return round(knob) if self.whole else knob

        knob = greatest_knob(size, most, low, self.high, task.sizes.setdefault(self.label, {}))
        if knob is None:
            return {"most": most, "refused": f"its least file has {size(low)} bytes, and {most} are allowed"}
        return {"knob": rounded(knob), "most": most, **self.restored(task, rounded(knob))}

    def restored(self, task: Task, knob: float) -> Cell:
        """Write, measure, read back and score."""
        with TemporaryDirectory() as folder:
            start = time.process_time()
            self.write(task, knob, Path(folder))
            seconds = time.process_time() - start
            size, state = bytes_on_disk(Path(folder)), self.read(task, Path(folder))
        cell = {"seconds": seconds, **point(task, size)}
        if not self.exact:
            return cell | task.scores(state)
        different = [name for name, tensor in task.tuned.items() if not tensor.equal(state[name])]
        if different:
            raise ValueError(f"{self.label} is not lossless: {different[0]} comes back different.")
        return cell | {"score": task.references["fine-tuned"], "exact": True}

    def written(self, task: Task, knob: float) -> int:
        """Return the bytes at a knob."""
        with TemporaryDirectory() as folder:
            self.write(task, knob, Path(folder))
            return bytes_on_disk(Path(folder))


def told(package: str) -> dict[str, Any]:
    """Return what a cell says of a package."""
    return {"package": package, "version": VERSIONS[package]}


def check_version(package: str) -> None:
    """Refuse to measure with a package of another version than the cell says.

    Raises:
        InputError: If it is another one, or is not installed.
    """
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "none"
    if found != VERSIONS[package]:
        raise dtrain.InputError(
            f"{package} {VERSIONS[package]} is measured, and {found} is installed. Use pip install 'dtrain[peers]'."
        )


def bytes_on_disk(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
