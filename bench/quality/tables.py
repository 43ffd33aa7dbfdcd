"""Tables and sentences of what has been measured: where dtrain loses first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean, stdev

from scipy.stats import t as student

from bench.cells import figure, share, show_share
from bench.quality.budgets import BUDGETS
from bench.quality.entries import CHOSEN
from bench.quality.found import Best, Found, Side, read, shown, side_of
from bench.quality.jobs import OWN, TASKS, jobs
from bench.record import Cell

RESULTS = Path("bench/results/quality")
TITLES = {
    "cifar": "a ViT of 2.7M parameters on five CIFAR-10 classes, accuracy on 2,000 images",
    "sst2": "MiniLM (22.7M parameters) on SST-2, accuracy on 872 sentences",
    "subj": "MiniLM on SUBJ, accuracy on 2,000 sentences",
    "digits": "a ViT of 0.45M parameters on five handwritten digits, accuracy on 225 images",
    "word_order": "a RoBERTa of 0.3M parameters on sentences with words swapped, accuracy on 684 sentences",
    "cola": "MiniLM on CoLA, Matthews correlation on 516 sentences; for direction only, the base is weak",
}
NOT_TASKS = ("adamr", "rates")
RIVALS: dict[Side, str] = {"peer": "package, adapter or floor", "stand-in": "preset of a published method"}
LOSSLESS = ("Lossless", "zipnn on the xor", "zipnn", "zstd on the xor", "zstd")


def load(folder: Path = RESULTS) -> list[Found]:
    """Return the results of all tasks that have some: those of one's own come last."""
    own = sorted(path.stem for path in folder.glob("*.json") if path.stem not in (*TASKS, *NOT_TASKS))
    return [found for name in (*TASKS, *own) if (found := read(folder, name)) is not None and found.scored]


def interval(values: Sequence[float], digits: int = 3) -> str:
    """Return the mean of paired differences and half the width of its 95 % confidence interval."""
    if len(values) < 2:
        return f"{fmean(values):+.{digits}f} (one seed)"
    return f"{fmean(values):+.{digits}f} ± {half_width(values):.{digits}f} (n = {len(values)})"


def half_width(values: Sequence[float]) -> float:
    """Return half the width of the 95 % confidence interval of a mean; infinity for one value."""
    if len(values) < 2:
        return math.inf
    return float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))


def decided(values: Sequence[float]) -> bool:
    """Return whether the interval leaves out zero."""
    return abs(fmean(values)) > half_width(values)


def paired(these: dict[int, Cell], others: dict[int, Cell]) -> list[float]:
    """Return the differences of scores at the seeds that both have."""
    return [these[seed]["score"] - others[seed]["score"] for seed in sorted(these.keys() & others.keys())]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return a Markdown table whose first `left` columns are words."""
    rule = ["---" if column < left else "--:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows)) + "\n"


def scores(cells: dict[int, Cell]) -> str:
    """Return mean and deviation over the seeds, and how many there are where it is one or two."""
    shown = figure([cell["score"] for cell in cells.values()])
    return shown if len(cells) > 2 else f"{shown} ({len(cells)} seed{'s' * (len(cells) > 1)})"


def named(found: Found, budget: float, best: Best) -> str:
    """Return an entry's score and name, and out of how many of how many it was the best."""
    if best.label is None:
        return "not measured" if best.possible else "nothing fits"
    told = f"{scores(found.at(budget, best.label))} {shown(best.label)}, best of {best.compared} of {best.possible}"
    if best.ahead is None:
        return told
    return f"{told}; with fewer seeds {scores(found.at(budget, best.ahead))} {shown(best.ahead)}"


def headline(found: Found) -> str:
    """Return what fits every budget: the entry that was chosen in advance, and the best of all others."""
    rows: list[list[str]] = []
    for budget in BUDGETS:
        chosen = found.at(budget, CHOSEN)
        rows.append(
            [
                f"{budget:g} ({allowed(found, budget)})",
                scores(chosen) if chosen else "does not fit" if found.refused(budget, CHOSEN) else "-",
                *(part for side in RIVALS for part in against(found, budget, side)),
                named(found, budget, found.best(budget, "dtrain")),
                kept(found, chosen, "base"),
                kept(found, chosen, "linear probe"),
            ]
        )
    rivals = (part for name in RIVALS.values() for part in (f"best {name}", "the chosen less it, 95 %"))
    columns = (f"`{CHOSEN}`, chosen in advance", *rivals, "best of dtrain's own")
    return table(("bit/param (bytes)", *columns, "gain kept by the chosen, over base", "over probe"), rows)


def against(found: Found, budget: float, side: Side) -> tuple[str, str]:
    """Return the best entry of a side, and how far the chosen one is ahead of it: in bold where it clearly is not."""
    rival = found.best(budget, side)
    name = named(found, budget, rival)
    if rival.label is None:
        return name, "-"
    differences = paired(found.at(budget, CHOSEN), found.at(budget, rival.label))
    if not differences:
        return name, "**-**" if found.refused(budget, CHOSEN) else "-"
    told = interval(differences)
    return name, f"**{told}**" if fmean(differences) < 0 and decided(differences) else told


def allowed(found: Found, budget: float) -> str:
    """Return the bytes of a budget, as any cell at it says."""
    most = [cell["most"] for key, cell in found.cells.items() if key.split(" | ")[1] == format(budget, "g")]
    return f"{most[0]:,}" if most else "-"


def kept(found: Found, cells: dict[int, Cell], floor: str) -> str:
    """Return the share of the gain over a floor that is kept, and its standard error."""
    if not cells:
        return "-"
    gains = [found.references[seed]["fine-tuned"] - found.references[seed][floor] for seed in cells]
    return show_share(share([cell["score"] - found.references[seed][floor] for seed, cell in cells.items()], gains))


def references(found: Found) -> str:
    """Return a line of the scores that everything else is read against."""
    values = list(found.references.values())
    parts = (f"{label} {figure([v[label] for v in values])}" for label in ("base", "linear probe", "fine-tuned"))
    return f"{len(values)} fine-tune(s), mean ± standard deviation: {', '.join(parts)}."


def losses(all_found: Sequence[Found]) -> str:
    """Return where others are ahead of the entry that was chosen in advance, the greatest distance first."""
    counted = [found for found in all_found if found.gains]
    left = [found.name for found in all_found if not found.gains]
    parts = [part for side, name in RIVALS.items() for part in lost_to(counted, side, name)]
    if left:
        parts.append(f"{', '.join(left)} is not counted here: its fine-tunes are no better than a linear probe.\n")
    return "\n".join([*parts, *lost_bits(all_found)]) + "\n"


def lost_to(all_found: Sequence[Found], side: Side, name: str) -> list[str]:
    """Return how often the best of a side is ahead, and a line for every time."""
    lost: list[tuple[float, str]] = []
    compared = clear = 0
    for found, budget in product(all_found, BUDGETS):
        rival, chosen = found.best(budget, side), found.at(budget, CHOSEN)
        if rival.label is None or not (chosen or found.refused(budget, CHOSEN)):
            continue
        compared += 1
        where = f"{found.name} at {budget:g} bit/param"
        best = f"{shown(rival.label)} ({scores(found.at(budget, rival.label))})"
        differences = paired(chosen, found.at(budget, rival.label))
        if not chosen:
            clear += 1
            lost.append((-1.0, f"* {where}: it does not fit; {best} does."))
        elif differences and fmean(differences) < 0:
            clear += decided(differences)
            ahead = f"{best}, the best of {rival.compared} of {rival.possible}, is ahead of {scores(chosen)}"
            lost.append((fmean(differences), f"* {where}: {ahead}: {interval(differences)}."))
    summary = (
        f"**The best {name}** is ahead of `{CHOSEN}` at {len(lost)} of {compared} pairs of task and budget, at {clear} "
        "of them by more than the interval, or because it does not fit.\n"
    )
    return [summary, *(line for _, line in sorted(lost)), ""]


def lost_bits(all_found: Sequence[Found]) -> list[str]:
    """Return a sentence for every task where a lossless peer writes fewer bytes."""
    lines: list[str] = []
    for found in all_found:
        sizes = {label: lossless_share(found, label) for label in LOSSLESS}
        known = {label: size for label, size in sizes.items() if size is not None}
        least = min(known, key=known.__getitem__, default=LOSSLESS[0])
        if least != LOSSLESS[0] and LOSSLESS[0] in known:
            both = f"{known[least]:.1%} of the checkpoint, `Lossless` {known[LOSSLESS[0]]:.1%}"
            lines.append(f"* {found.name}, bit for bit: {least} takes {both}.")
    return lines


def lossless_share(found: Found, label: str) -> float | None:
    """Return the bytes of a lossless file as a share of the float32 checkpoint; None where it was not measured."""
    cells = found.scored.get((OWN, label), {}).values()
    return fmean(cell["bits_per_parameter"] for cell in cells) / 32 if cells else None


def everything(found: Found) -> str:
    """Return all entries at all budgets of one task."""
    rows: list[list[str]] = []
    for budget in (*BUDGETS, None):
        for label in found.labels:
            at = format(budget, "g") if budget else OWN
            if cells := found.scored.get((at, label)):
                rows.append([at, shown(label), *figures(found, cells)])
    header = ("budget", "entry", "seeds", "file bytes", "bit/param", "score", "over base", "over probe", "processor s")
    return table(header, rows, left=2)


def figures(found: Found, cells: dict[int, Cell]) -> list[str]:
    values = list(cells.values())
    spent = [cell["seconds"] for cell in values if "seconds" in cell]
    return [
        str(len(values)),
        f"{fmean(cell['file_bytes'] for cell in values):,.0f}",
        f"{fmean(cell['bits_per_parameter'] for cell in values):.4f}",
        scores(cells),
        kept(found, cells, "base"),
        kept(found, cells, "linear probe"),
        f"{fmean(spent):.1f}" if spent else "-",
    ]


def refusals(found: Found) -> str:
    """Return a line of what does not fit which budget."""
    refused: dict[str, set[str]] = {}
    for key, cell in found.cells.items():
        _, budget, label = key.split(" | ", 2)
        if "refused" in cell:
            refused.setdefault(label, set()).add(budget)
    parts = [f"{label} ({', '.join(sorted(b, key=float, reverse=True))})" for label, b in refused.items()]
    return f"Does not fit: {'; '.join(parts)}." if parts else ""


def lossless(all_found: Sequence[Found]) -> str:
    """Return the bytes of what comes back bit for bit, in shares of the checkpoint."""
    rows: list[list[str]] = []
    for found in all_found:
        sizes = (lossless_share(found, label) for label in LOSSLESS)
        rows.append([found.name, *("-" if size is None else f"{size:.1%}" for size in sizes)])
    return table(("task", "dtrain `Lossless`", *LOSSLESS[1:]), rows)


def missing(found: Found) -> tuple[int, int]:
    """Return how many cells of a task at three seeds are not there, and how many there are to be."""
    keys = {job.key for job in jobs((found.name,), (0, 1, 2), Path())}
    return len(keys - found.cells.keys()), len(keys)


def counts(all_found: Sequence[Found]) -> str:
    """Return how much there is behind the tables."""
    rows: list[list[str]] = []
    for found in all_found:
        by_seed = [sum(seed in cells for cells in found.scored.values()) for seed in sorted(found.references)]
        entries = [sum(side_of(label) == side for label in found.labels) for side in ("dtrain", "stand-in", "peer")]
        rows.append([found.name, *map(str, (sum(by_seed), *entries)), ", ".join(map(str, by_seed))])
    return table(("task", "scores", "dtrain entries", "stand-ins", "peers", "scores by seed"), rows)
