"""Advice for people: what was measured, the chart line by line, what to run and what it would weigh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from dtrain.advice.chart import Step, short
from dtrain.advice.choices import Choice
from dtrain.advice.measure import Measures
from dtrain.advice.sizes import Expected, Sizes
from dtrain.advice.verdict import is_large, is_sparse

#: What is to be said of every role of a tensor that the fine-tuned model has.
ROLES = {
    "method": "compressed by the method",
    "vector": "delta of norms and biases, of a few bits a value",
    "half": "full delta in half precision",
    "whole": "stored whole: new, or a head by its name",
    "bits": "bit for bit, at most",
    "same": "unchanged",
    "embedding": "embeddings, left at the base",
    "drop": "left at the base by a rule",
}
_WORST = 3
_HEAVY = 1.35  # rms / mean |D|; 1.36 for Student's t with five degrees of freedom
_UNEVEN = 0.7  # share of the energy in half of the patches
_LOW_RANK = 0.5  # share of it in a twentieth of the singular values


def measure_table(measures: Measures) -> Table:
    """Return what was measured of all matrices, each figure with what it means."""
    table = _table(
        f"delta of {measures.elements:,} weights in {len(measures.tensors)} matrices", "<measure", ">value", "<reads as"
    )
    for reading in _readings(measures):
        table.add_row(*reading)
    table.caption = "Shares and ratios are means over the matrices, weighted by their energy (the sum of D^2)."
    return table


def worst_table(measures: Measures) -> Table:
    """Return the tensors that changed most."""
    headers = ("<changed most, relative to the base", ">mean |D|", ">||D|| / ||W0||", ">rms / mean", ">90 % in rank")
    table = _table("", *headers)
    for tensor in measures.largest(_WORST):
        relative = "-" if tensor.relative is None else short(tensor.relative)
        rank = "-" if tensor.spectrum is None else f"{tensor.spectrum.rank90} of {tensor.spectrum.side}"
        table.add_row(Text(tensor.name), short(tensor.mean_abs), relative, f"{tensor.tails:.3f}", rank)
    return table


def chart_table(steps: Sequence[Step]) -> Table:
    """Return the chart: question, answer, the number behind it, and whose rule it is."""
    table = Table.grid(padding=(0, 1))
    for number, step in enumerate(steps, 1):
        heading = Text.assemble((step.question, "bold"), " ", (f"{step.answer}.", "bold green"))
        table.add_row(f"{number:>2}.", heading)
        table.add_row("", Text.assemble(step.because, " ", (f"[{step.source}]", "dim")))
    return table


def choice_lines(choices: Sequence[Choice]) -> list[str]:
    """Return what to run, in lines that are not to be broken, so that they can be pasted."""
    lines: list[str] = []
    for choice in choices:
        lines += [f"  {choice.when}" + (f": about {_weight(choice.expected)}" if choice.expected else "")]
        lines += ["      " + ", ".join(filter(None, (choice.method, choice.data)))]
        lines += [f"      {choice.command}"] if choice.command else []
    return lines


def size_table(expected: Sequence[Expected]) -> Table:
    """Return what files would weigh at a few keep rates."""
    values = {16: "16-bit values", 1: "1-bit values (sign)"}
    masks = "positions stored" if any(item.indexed for item in expected) else "positions drawn from a seed"
    table = _table(f"estimated files, {masks}", ">keep", *(f">{name}" for name in values.values()))
    for keep in dict.fromkeys(item.keep for item in expected):
        found = {item.bits: _weight(item) for item in expected if item.keep == keep}
        table.add_row(f"{keep:g}", *(found[bits] for bits in values))
    return table


def role_table(sizes: Sizes) -> Table:
    """Return the tensors by what the rules make of them."""
    headers = ("<tensors", ">count", ">elements", ">checkpoint bytes", ">delta bytes")
    table = _table(f"checkpoint of {sizes.checkpoint_bytes:,} bytes", *headers)
    for row in sizes.roles:
        file_bytes = "by keep rate" if row.file_bytes is None else f"{row.file_bytes:,}"
        cells = (f"{row.tensors:,}", f"{row.elements:,}", f"{row.checkpoint_bytes:,}", file_bytes)
        table.add_row(ROLES[row.role], *cells)
    return table


def _readings(measures: Measures) -> Iterable[tuple[str, str, str]]:
    size = "large" if is_large(measures) else "small"
    yield "mean |D| of the entries that changed", short(measures.mean_abs), size
    yield "their rms", short(measures.rms), ""
    yield "||D|| / ||W0||", short(measures.relative), ""
    yield "exact zeros", f"{measures.zeros:.1%}", "most of it" if is_sparse(measures) else ""
    tails = "heavy tails" if measures.tails > _HEAVY else "no heavy tails"
    yield "rms / mean |D|", f"{measures.tails:.3f}", f"{tails} (Gaussian: 1.253)"
    yield "energy in the largest 1 % of the entries", f"{measures.top1:.1%}", "Gaussian: 8.5%"
    if measures.patches is not None:
        evenness = "even" if measures.patches < _UNEVEN else "uneven"
        yield "energy in half of the 16 x 16 patches", f"{measures.patches:.1%}", f"{evenness} (Gaussian: 53.5%)"
    stable = measures.spectral(lambda spectrum: spectrum.stable_rank)
    top5 = measures.spectral(lambda spectrum: spectrum.top5)
    if stable is not None and top5 is not None:
        low = "low rank" if top5 > _LOW_RANK else "spread out"
        yield "energy in the top 5 % of the singular values", f"{top5:.1%}", f"{low} (random square matrix: 17%)"
        yield "stable rank, ||D||_F^2 / ||D||_2^2", f"{stable:.1f}", _counted(measures)


def _counted(measures: Measures) -> str:
    return f"{len(measures.with_spectrum)} of {len(measures.tensors)} matrices decomposed"


def _weight(expected: Expected) -> str:
    return f"{expected.file_bytes:,} bytes ({expected.ratio:,.0f}x)"


def _table(title: str, *headers: str) -> Table:
    """Return an empty table; a header starts with < or >, the side its column is aligned to."""
    table = Table(title=title or None, title_justify="left", caption_justify="left", box=box.SIMPLE, pad_edge=False)
    for header in headers:
        table.add_column(header[1:], justify="left" if header[0] == "<" else "right")
    return table
