"""All cells, in the order in which they are measured: breadth first, what costs little before what costs much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

from bench.cells import INPUTS, Job, task_of
from bench.quality import entries
from bench.quality.budgets import BUDGETS
from bench.quality.entries import Entry
from bench.quality.measure import measure
from bench.quality.peers import PEERS, Peer

OWN = "own"  # in the place of a budget: the only file there is


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    """Yield all cells, in the order in which they are measured."""
    for seed, name in product(seeds, names):
        yield from entry_jobs(name, seed, shared, entries.PLAIN[:1])
        yield from peer_jobs(name, seed, shared, PEERS.values())
        yield from entry_jobs(name, seed, shared, entries.PLAIN[1:])


def entry_jobs(name: str, seed: int, shared: Path, those: Iterable[Entry]) -> Iterator[Job]:
    for entry, budget in product(those, BUDGETS):
        yield entry_job(name, seed, shared, entry, budget)


def peer_jobs(name: str, seed: int, shared: Path, those: Iterable[Peer]) -> Iterator[Job]:
    for peer in those:
        for budget in BUDGETS if peer.low is not None else (None,):
            yield peer_job(name, seed, shared, peer, budget)


def entry_job(name: str, seed: int, shared: Path, entry: Entry, budget: float) -> Job:
    settings = {"budget": budget, **entry.settings(seed)}
    task = (name, seed)
    return Job(
        key(seed, budget, entry.label), settings, lambda: measure(task_of(*task, shared), entry, budget), (task,)
    )


def peer_job(name: str, seed: int, shared: Path, peer: Peer, budget: float | None) -> Job:
    settings = {"budget": budget, "inputs": INPUTS, **peer.settings()}
    task = (name, seed)
    return Job(key(seed, budget, peer.label), settings, lambda: peer.measure(task_of(*task, shared), budget), (task,))


def key(seed: int, budget: float | None, label: str) -> str:
    return f"{seed} | {OWN if budget is None else format(budget, 'g')} | {label}"
