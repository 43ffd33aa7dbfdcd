"""What was measured, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from bench.speed.measure import jobs

RESULTS = Path("bench/results/speed")
VERSUS = RESULTS / "versus.json"
#: Parameters and dtype of the pairs of models, in the order in which they are measured.
PAIRS = (
    ("bfloat16", "20M"),
    ("float32", "20M"),
    ("bfloat16", "100M"),
    ("float32", "100M"),
    ("bfloat16", "300M"),
    ("bfloat16", "1B"),
)
COPY = "memory copy"
#: Of dtrain and another tool, the two that do the same: signs of everything, a tenth of the elements, all bits.
ALIKE = (
    ("dtrain BitDelta", "deltatensors quantized"),
    ("dtrain DareX", "deltatensors sparse"),
    ("dtrain DareX", "deltatensors int4"),
    ("dtrain DareX", "sparse-llm int8"),
    ("dtrain Lossless", "zipnn"),
    ("dtrain Lossless", "zstd -3"),
)
TITLES = {
    "write": "Two models in memory, a file on the disk (compress and save)",
    "read": "A file and the base in memory, all fine-tuned weights in memory (load and rebuild)",
    "swap": "A file's fine-tuned weights into a live module (load and apply)",
}
#: The steps of an operation that its table is about; None for all of them.
STEPS: dict[str, str | None] = {"write": None, "read": None, "swap": "apply"}

#: What would make functions faster in which much time is spent.
REMEDIES = {
    "singular_factors": "all eigenvectors in float64, where few are kept: a random range finder, with other files",
    "philox4x32": "ten rounds of some ten passes over int64 tensors: one compiled loop",
    "_trace_norm": "all singular values of every matrix: an estimate from a few random vectors, with other files",
    "random_order": "a sort of every element: a partial one for each level",
    "structure.positions": "a random word for every element, kept or not: one draw a group, in another format",
    "_counts": "small calls for every tensor at every step of a bisection: all tensors at once",
    "weights.digest": "SHA-256 of the base at every call: its digests could be kept while it stays loaded",
    "_touched": "SHA-256 of what was written, to know it again: a cheaper hash",
    "rans_decode": "one symbol after another, in constriction: several streams side by side, in another format",
    "merge.add": "a pass each to widen, multiply, add and round: one compiled loop",
    "quantise.encode": "passes over float32 and float64 copies: one compiled loop",
    "transform.inverse": "the product in float64: float32 would not be the same on all machines",
    "difference.delta": "a pass each to widen, subtract and round: one compiled loop",
}

Cells = dict[str, dict[str, Any]]
Found = dict[tuple[str, str], Cells]
Row = Mapping[str, Any]


def file_of(dtype: str, size: str) -> Path:
    return RESULTS / f"{dtype}-{size}.json"


def cells() -> Found:
    """Return all cells by dtype and size, and then by key."""
    files = {pair: file_of(*pair) for pair in PAIRS}
    return {pair: json.loads(file.read_text())["cells"] for pair, file in files.items() if file.exists()}


def totals(row: Row, clock: int, step: str | None = None) -> list[float]:
    """Return the seconds (clock 0) or the processor seconds (1) of every round, of all steps or of one."""
    steps = [values for name, values in row["steps"].items() if step in (None, name)]
    return [sum(value[clock] for value in values) for values in zip(*steps, strict=True)]


def ratio(row: Row, floor: Row, step: str | None = None) -> float:
    """Return the median over the rounds of the ratio of processor seconds, which others on the machine change least."""
    pairs = zip(totals(row, 1, step), totals(floor, 1, floor_step(floor, step)), strict=True)
    return median(a / b for a, b in pairs)


def floor_step(floor: Row, step: str | None) -> str | None:
    return step if step in floor["steps"] else None


def rate(row: Row, size: int, step: str | None = None, pick: Callable[[list[float]], float] = min) -> float:
    """Return MB of the fine-tuned checkpoint per second, in the fastest round or in the median one."""
    return size / 1e6 / pick(totals(row, 0, step))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown whose first column is words."""
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows)) + "\n"


def markdown() -> str:
    """Return everything that was measured, the losses first."""
    found = cells()
    if not found:
        return "Nothing has been measured yet: `python -m bench.speed`.\n"
    parts = [introduction(found), losses(found)]
    parts += [f"**{TITLES[what]}**\n\n{operation(found, what)}" for what in TITLES if has(found, what)]
    makers = (steps_table, memory_table, optimizer_table, others_table, slowest, levels)
    parts += [*(make(found) for make in makers), versus(), gaps(found)]
    return "\n".join(filter(None, parts))


def gaps(found: Found) -> str:
    """Return what has not been measured as it would be now."""
    lines: list[str] = []
    for dtype, size in PAIRS:
        cells = found.get((dtype, size), {})
        every = list(jobs(dtype, size))
        left = [job for job in every if cells.get(job.key, {}).get("settings") != job.settings]
        if left:
            lines.append(f"{size} {dtype} {len(left)} of {len(every)}")
    return f"Cells not measured yet: {', '.join(lines)}. `python -m bench.speed` measures them.\n" if lines else ""


def has(found: Found, key: str) -> bool:
    return any(key in these for these in found.values())


def introduction(found: Found) -> str:
    machines = [cell["machine"] for these in found.values() for cell in these.values()]
    names = sorted({f"{m['cpu']}, {m['cores']} cores, torch {m['torch']}" for m in machines})
    loads = [m["load"] for m in machines]
    threads = sorted({cell["settings"]["threads"] for these in found.values() for cell in these.values()})
    return (
        f"Measured on {'; '.join(names)}; {', '.join(map(str, threads))} thread(s) a process; the load average was "
        f"{min(loads)} to {max(loads)} meanwhile. MB/s are of the fine-tuned checkpoint, in the fastest round by the "
        "clock on the wall. In brackets is the ratio to a memory copy of the checkpoint: the median over the rounds of "
        "processor seconds of the same round. dtrain hashes the whole base each time, syncs what it writes, and treats "
        "every tensor here, the embeddings too. deltatensors hashes the base, and reads it from its file in bfloat16; "
        "sparse-llm, zipnn, Zstandard, safetensors and torch look at no base or do not check it: zipnn and zstd code "
        "the checkpoint here, and its bits xor the base's in the table of lossless files above.\n\n"
        "![MB/s and peak memory against parameters](docs/results/speed.png)\n"
    )


class Comparison(NamedTuple):
    """dtrain against another tool: how many times as many processor seconds, and bytes, it takes."""

    ours: str
    theirs: str
    what: str
    models: tuple[str, str]
    seconds: float
    size: float


def losses(found: Found) -> str:
    """Return how dtrain compares with the tools that are nearest to its methods, the worst first."""
    every = list(comparisons(found))
    if not every:
        return ""
    pairs = dict.fromkeys(each.models for each in every)
    rows: dict[tuple[str, str, str], dict[tuple[str, str], Comparison]] = {}
    for each in every:
        rows.setdefault((each.ours, each.theirs, each.what), {})[each.models] = each
    ordered = sorted(rows.items(), key=lambda row: -max(each.seconds for each in row[1].values()))
    lines = [
        [
            f"{ours} / {theirs}: {what}",
            *(shown(by_models[pair].seconds) if pair in by_models else "-" for pair in pairs),
            ", ".join(dict.fromkeys(f"{each.size:.2f}" for each in by_models.values())),
        ]
        for (ours, theirs, what), by_models in ordered
    ]
    header = ["processor seconds, dtrain / the tool nearest to it", *(f"{size} {dtype}" for dtype, size in pairs)]
    slower = sum(each.seconds > 1 for each in every)
    text = f"dtrain takes more processor time in {slower} of {len(every)} comparisons, in bold; the worst come first."
    return f"**Where we lose.** {text}\n\n{table([*header, 'bytes of the file'], lines)}"


def shown(seconds: float) -> str:
    return f"**{seconds:.2f}**" if seconds > 1 else f"{seconds:.2f}"


def comparisons(found: Found) -> Iterator[Comparison]:
    for pair, these in found.items():
        for what in TITLES:
            rows = these.get(what, {}).get("found", {})
            for ours, theirs in ALIKE:
                if ours in rows and theirs in rows:
                    seconds = ratio(rows[ours], rows[theirs], STEPS[what])
                    yield Comparison(ours, theirs, what, pair, seconds, rows[ours]["bytes"] / rows[theirs]["bytes"])


def operation(found: Found, what: str) -> str:
    """Return MB/s and ratio to a memory copy, by contender and pair of models."""
    columns = {pair: these[what]["found"] for pair, these in found.items() if what in these}
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    rounds = {pair: found[pair][what]["settings"]["rounds"] for pair in columns}
    models = [f"{size} {dtype}, rounds: {rounds[dtype, size]}" for dtype, size in columns]
    header = ["", *models, "file, share of the checkpoint", "lossless"]
    lines: list[list[str]] = []
    for name in names:
        line = [name, *(speed(r[name], r[COPY], STEPS[what]) if name in r else "-" for r in columns.values())]
        first = next(rows for rows in columns.values() if name in rows)
        line += [f"{first[name]['bytes'] / first[COPY]['bytes']:.2%}", "yes" if first[name]["exact"] else "no"]
        lines.append(line)
    return table(header, lines)


def speed(row: Row, floor: Row, step: str | None) -> str:
    step = floor_step(row, step)
    return f"{rate(row, floor['bytes'], step):,.0f} ({ratio(row, floor, step):.1f})"


def steps_table(found: Found) -> str:
    """Return MB/s of each of dtrain's steps by itself."""
    lines: dict[tuple[str, str], list[str]] = {}
    for position, these in enumerate(found.values()):
        for what in TITLES:
            rows = these.get(what, {}).get("found", {})
            for name, row in rows.items():
                for step in row["steps"] if row["kind"] == "dtrain" else ():
                    line = lines.setdefault((name, step), ["-"] * len(found))
                    line[position] = f"{rate(row, rows[COPY]['bytes'], step):,.0f}"
    header = ["step, MB/s", *[f"{size} {dtype}" for dtype, size in found]]
    ordered = [[f"{name}: {step}", *line] for (name, step), line in lines.items()]
    return f"**dtrain, step by step**\n\n{table(header, ordered)}" if lines else ""


def memory_table(found: Found) -> str:
    """Return the peak memory beyond what holds the models, as a share of the checkpoint."""
    columns = [pair for pair, these in found.items() if any(key.startswith("memory | ") for key in these)]
    lines: dict[tuple[str, str], list[str]] = {}
    for position, pair in enumerate(columns):
        for key, cell in found[pair].items():
            for what, steps in cell["found"].items() if key.startswith("memory | ") else ():
                line = lines.setdefault((key.removeprefix("memory | "), what), ["-"] * len(columns))
                peak = max(steps.values())
                line[position] = f"{peak / 1e6:,.0f} ({peak / cell['checkpoint_bytes']:.2f})"
    header = ["peak MB (of the checkpoint's size)", *[f"{size} {dtype}" for dtype, size in columns]]
    ordered = [[f"{name}: {what}", *line] for (name, what), line in sorted(lines.items(), key=lambda item: item[0][1])]
    if not lines:
        return ""
    return (
        "**Memory beyond what holds the models** (a process each; what read returns counts, and so do the pages of "
        f"files that deltatensors maps in bfloat16)\n\n{table(header, ordered)}"
    )


def optimizer_table(found: Found) -> str:
    """Return what a step of each optimizer costs, and its ratios to torch's AdamW of the same kind and to a copy."""
    columns = {pair: these["step"]["found"] for pair, these in found.items() if "step" in these}
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    lines = [[name, *(optimizer(r, name) if name in r else "-" for r in columns.values())] for name in names]
    header = ["optimizer: ms, ratio to its AdamW, to a copy", *[f"{size} {dtype}" for dtype, size in columns]]
    return f"**A step of AdamR**\n\n{table(header, lines)}" if lines else ""


def optimizer(rows: Mapping[str, Row], name: str) -> str:
    peer = name.replace("AdamR", "AdamW").partition(",")[0]
    row = rows[name]
    to_peer = f"{ratio(row, rows[peer]):.2f}" if peer in rows else "-"
    return f"{1000 * min(totals(row, 0)):,.1f}, {to_peer}, {ratio(row, rows[COPY]):.1f}"


def others_table(found: Found) -> str:
    """Return the rates of the methods that are measured at one size only."""
    lines: dict[str, list[str]] = {}
    for these in found.values():
        for position, what in enumerate(("write", "read")):
            rows = these.get(f"{what} | other methods", {}).get("found", {})
            for name, row in rows.items():
                line = lines.setdefault(name, ["-", "-"])
                line[position] = speed(row, rows[COPY], None)
    header = ("the other methods, 20M bfloat16", "compress and save", "load and rebuild")
    return table(header, [[name, *line] for name, line in lines.items()]) if lines else ""


def slowest(found: Found) -> str:
    """Return dtrain's slowest ways of each operation, where their time goes, and what would make them faster."""
    profiles = next((these["profile"]["found"] for these in found.values() if "profile" in these), None)
    if profiles is None:
        return ""
    lines: list[list[str]] = []
    for what in TITLES:
        ways = sorted(
            ((rows[what]["seconds"], name, rows[what]["shares"]) for name, rows in profiles.items()), reverse=True
        )
        for seconds, name, shares in ways[:3]:
            most = ", ".join(f"`{function.removeprefix('dtrain.')}` {share:.0%}" for function, share in shares.items())
            lines.append([f"{what}: {name}", f"{seconds:.2f}", most, remedies(shares)])
    header = ("the slowest three, 20M bfloat16", "processor s", "share of it", "what would make it faster")
    return f"**Where the time goes** (functions of dtrain with what they call)\n\n{table(header, lines)}"


def remedies(shares: Mapping[str, float]) -> str:
    """Return what is known about the functions that take a tenth or more."""
    found = (text for name, share in shares.items() for key, text in REMEDIES.items() if key in name and share >= 0.1)
    return "; ".join(dict.fromkeys(found)) or "nothing that stands out"


def levels(found: Found) -> str:
    """Return what the levels of Zstandard make of what `Lossless` codes."""
    columns = {pair: these["levels"]["found"] for pair, these in found.items() if "levels" in these}
    names = dict.fromkeys(level for rows in columns.values() for level in rows)
    lines = [[n, *(f"{r[n]['bytes']:,} ({r[n]['seconds']:.2f})" for r in columns.values())] for n in names]
    header = ["level: bytes (processor s)", *[f"{size} {dtype}" for dtype, size in columns]]
    return (
        f"**What `Lossless` codes, and what Zstandard makes of it in one go**\n\n{table(header, lines)}"
        if lines
        else ""
    )


def versus() -> str:
    """Return what the last change for the sake of speed was worth: the least processor seconds of several rounds."""
    if not VERSUS.exists():
        return ""
    found = json.loads(VERSUS.read_text())
    least = {key: (min(spent["before"]), min(spent["after"])) for key, spent in found["seconds"].items()}
    rows = [
        [key.replace(" | ", ": "), f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}"]
        for key, (before, after) in least.items()
    ]
    header = ("20M bfloat16, processor s", "before", "after", "ratio")
    rounds = min(len(values) for spent in found["seconds"].values() for values in spent.values())
    how = f"`python -m bench.speed.versus`, the least of {rounds} rounds each, before is {found['before']}"
    return f"**{found['what']}** ({how})\n\n{table(header, rows)}"
