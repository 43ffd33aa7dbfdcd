"""All cells, in the order in which they are measured: breadth first, what costs little before what costs much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from bench.cells import INPUTS, task_of
from bench.quality import entries
from bench.quality.adapters import ADAPTERS, Adapter, Probe, rates_of
from bench.quality.budgets import BUDGETS
from bench.quality.entries import ENTRIES, Entry
from bench.quality.measure import measure
from bench.quality.peers import PEERS, Peer
from bench.record import Cell, Job

OWN = "own"  # in the place of a budget: the only file there is
#: In the order of the tables; CoLA for direction only, since its base is weak.
TASKS = ("cifar", "sst2", "subj", "digits", "word_order", "cola")
QUICK = ("digits", "word_order")  # a cell takes seconds

PROBE = Probe()

Kind = Entry | Peer | Adapter | Probe
KINDS: dict[str, Kind] = {PROBE.label: PROBE, **ENTRIES, **PEERS, **ADAPTERS}

FIRST = (PROBE.label, entries.CHOSEN, "deltatensors, sparse", "deltatensors, one bit")
SECOND = ("SeededSign", "DeltaDQ", "BitDelta", "DARE, seeded")
THIRD = ("LoRA on attention", "biases only")
FOURTH = ("SeededSign + Learn", "sparse-llm, SVD", "mergekit DARE, zstd on the xor", "UltraDelta", "zipnn on the xor")


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells, in the order in which they are measured; one may come twice."""
    quick = [name for name in names if name in QUICK]
    slow = [name for name in names if name not in QUICK and name != "cola"]
    waves: tuple[tuple[Sequence[str], Sequence[int], Iterable[str]], ...] = (
        (quick, seeds[:1], (*ENTRIES, *PEERS)),
        (slow, seeds, FIRST),
        (slow, seeds[:1], SECOND),
        (slow, seeds[:1], THIRD),
        (slow, seeds[:1], FOURTH),
        (quick, seeds, KINDS),
        (slow, seeds, SECOND),
        (slow, seeds, KINDS),
        (names, seeds, KINDS),
    )
    for wave, at, labels in waves:
        for seed, name in product(at, wave):
            for label in labels:
                yield from jobs_of(name, seed, shared, label)


def jobs_of(name: str, seed: int, shared: Path, label: str) -> Iterator[Job]:
    """Yield the cells of one task, seed and entry, at all budgets."""
    kind = KINDS[label]
    if isinstance(kind, Adapter) and not rates_of(name, label):
        return  # a task of one's own: bench.quality.rates comes first
    for budget in BUDGETS if budgeted(kind) else (None,):
        yield job(name, seed, shared, kind, budget)


def budgeted(kind: Kind) -> bool:
    """Return whether it can be made to fit a budget."""
    if isinstance(kind, Peer):
        return kind.low is not None
    if isinstance(kind, Entry):
        return kind.low < kind.high
    return isinstance(kind, Adapter) and kind.ranked


def job(name: str, seed: int, shared: Path, kind: Kind, budget: float | None) -> Job:
    def run() -> Cell:
        task = task_of(name, seed, shared)
        return measure(task, kind, budget) if isinstance(kind, Entry) else kind.measure(task, budget)

    at: dict[type, tuple[Any, ...]] = {Entry: (seed,), Adapter: (name,)}
    found: dict[str, Any] = kind.settings(*at.get(type(kind), ()))
    return Job(key(seed, budget, kind.label), {"budget": budget, "inputs": INPUTS, **found}, run, ((name, seed),))


def key(seed: int, budget: float | None, label: str) -> str:
    return f"{seed} | {OWN if budget is None else format(budget, 'g')} | {label}"
