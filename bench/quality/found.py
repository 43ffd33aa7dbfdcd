"""What has been measured: cells by entry, budget and seed, whose they are, and what of it fits a budget."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

from bench.quality.entries import Entry
from bench.quality.jobs import KINDS, OWN, jobs
from bench.quality.peers.disk import LENIENT
from bench.record import Cell

Side = Literal["dtrain", "stand-in", "peer"]


def side_of(label: str) -> Side:
    """Return whose an entry is: ours, our preset of a published method, or a peer's package, adapter or floor."""
    kind = KINDS[label]
    return kind.group if isinstance(kind, Entry) else "peer"


def shown(label: str) -> str:
    """Return an entry's name in a table: what stands in for a method without a package says so."""
    return f"dtrain's preset of {label}" if side_of(label) == "stand-in" else label


class Best(NamedTuple):
    """The best entry of a side.

    Args:
        label: Its name; None where nothing fits, or has been measured.
        compared: How many it is the best of.
        possible: How many there may be: those with fewer seeds, and those not measured yet, are among them.
        ahead: One with fewer seeds that is further above its fine-tunes; None where there is none.
    """

    label: str | None
    compared: int
    possible: int
    ahead: str | None


@dataclass(frozen=True)
class Found:
    """The results of one task.

    Args:
        name: Of the task.
        references: Scores of base, linear probe and fine-tuned model, by seed.
        cells: Cells by key.
    """

    name: str
    references: dict[int, dict[str, float]]
    cells: dict[str, Cell]

    @cached_property
    def scored(self) -> dict[tuple[str, str], dict[int, Cell]]:
        """Cells with a score, by (budget, label) and seed."""
        found: dict[tuple[str, str], dict[int, Cell]] = {}
        for key, cell in self.cells.items():
            seed, budget, label = key.split(" | ", 2)
            if label in KINDS and "score" in cell:
                found.setdefault((budget, label), {})[int(seed)] = cell
        return found

    @property
    def labels(self) -> list[str]:
        """Entries with a score, in the order of the catalogue."""
        known = {label for _, label in self.scored}
        return [label for label in KINDS if label in known]

    def at(self, budget: float, label: str) -> dict[int, Cell]:
        """Return the cells by seed that an entry has to show at a budget.

        An entry without a knob is shown at every budget that its file fits, and a peer's where it exceeds one by a
        tenth at most.
        """
        if found := self.scored.get((format(budget, "g"), label)):
            return found
        fixed = self.scored.get((OWN, label), {})
        return {seed: cell for seed, cell in fixed.items() if fits(cell, budget, label)}

    def refused(self, budget: float, label: str) -> bool:
        """Return whether not even the least file of an entry fits a budget."""
        end = f"| {budget:g} | {label}"
        return any(key.endswith(end) and "refused" in cell for key, cell in self.cells.items())

    def points(self, label: str) -> Iterator[dict[int, Cell]]:
        """Yield all cells of an entry, budget by budget."""
        for (_, name), found in self.scored.items():
            if name == label:
                yield found

    def best(self, budget: float, side: Side) -> Best:
        """Return the entry of a side with the highest mean score at a budget, above the fine-tunes of its seeds.

        Only those with the most seeds are compared: the best of many single seeds would be the luckiest.
        """
        labels = [label for label in KINDS if side_of(label) == side]
        found = {label: self.at(budget, label) for label in labels}
        most = max(map(len, found.values()), default=0)
        margins = {
            label: fmean(cell["score"] - self.references[seed]["fine-tuned"] for seed, cell in cells.items())
            for label, cells in found.items()
            if cells
        }
        compared = {label: margin for label, margin in margins.items() if len(found[label]) == most}
        unknown = sum(not cells and self.unmeasured(budget, label) for label, cells in found.items())
        best, any_best = (max(those, key=those.__getitem__, default=None) for those in (compared, margins))
        return Best(best, len(compared), len(margins) + unknown, None if any_best in compared else any_best)

    @property
    def gains(self) -> bool:
        """Return whether the fine-tunes are better than a linear probe: else there is nothing to keep."""
        return fmean(r["fine-tuned"] - r["linear probe"] for r in self.references.values()) > 0

    def unmeasured(self, budget: float, label: str) -> bool:
        """Return whether it is not known yet if an entry fits a budget."""
        return not self.refused(budget, label) and (OWN, label) not in self.scored


def fits(cell: Cell, budget: float, label: str) -> bool:
    return cell["bits_per_parameter"] <= budget * (1.0 if side_of(label) == "dtrain" else LENIENT)


def read(folder: Path, name: str) -> Found | None:
    """Return the results of a task that were measured as they would be now; None where there are none."""
    path = folder / f"{name}.json"
    if not path.exists():
        return None
    results = json.loads(path.read_text())
    references = {int(key.split(" | ")[1]): value for key, value in results["references"].items()}
    now = {job.key: job.settings for job in jobs((name,), sorted(references), Path())}
    cells = {key: cell for key, cell in results["cells"].items() if cell["settings"] == now.get(key)}
    return Found(name, references, cells)
