"""A progress bar for work that takes longer than a breath. It goes to standard error and only to a terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Advance = Callable[[str], None]


@contextmanager
def progress(title: str, total: int | None = None) -> Generator[Advance]:
    """Show a bar while the context lasts; Ctrl-C interrupts the work as usual.

    Args:
        title: What is going on.
        total: Number of steps, where it is known.

    Yields:
        A function that advances the bar by one step and shows a short note beside it.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
