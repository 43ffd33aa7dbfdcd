"""Small files: what norms, biases, embeddings and fresh heads cost, and what cheaper codes for them do to the model.

    python -m bench.small_files --task sst2 cifar --seeds 0 1 2 --shared ../shared
    python -m bench.small_files --table --markdown                   # only show what has been measured

* Codes: one rule after another is changed at `SeededSign(keep=1/32)` with scales of 1/keep, about the rate of a file
  2000x smaller than the checkpoint. The defaults were chosen by the change of the last hidden state on 256 unlabelled
  training inputs, in units of the base's; scores on the validation split are shown and decided nothing.
* Bytes: the greatest keep rate whose file is 1000x, 2000x and 5000x smaller than the checkpoint, and where its bytes
  are: under the rules of before (embeddings compressed, norms and biases in half precision, the head exact; the four
  bytes more that every base tensor's digest had are added) and under the default rules. Nothing is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import dtrain
from bench.cells import caption, chosen, figure, fill, greatest_keep, parser_for, plain, scored, show, task_of
from bench.record import Cell, Job, Results, read_results
from bench.tasks import TASKS
from dtrain.artifact import Role
from dtrain.stages import All

RATIOS = (1000, 2000, 5000)
KEEP = 1 / 32
BEFORE = dtrain.Rules(embeddings=(), vectors="float16", fresh="exact")
VECTORS = ("*.bias", "*[Nn]orm*.weight")
#: By label: what differs from the default rules, and the keep rate.
CODES: dict[str, tuple[dict[str, Any], float]] = {
    "default": ({}, KEEP),
    "vectors float16": ({"vectors": "float16"}, KEEP),
    "vectors uniform4": ({"vectors": "uniform4"}, KEEP),
    "vectors at the base": ({"drop": VECTORS}, KEEP),
    "fresh exact": ({"fresh": "exact"}, KEEP),
    "fresh uniform4": ({"fresh": "uniform4"}, KEEP),
    "embeddings by the method": ({"embeddings": ()}, KEEP),
    "no embeddings, keep twice": ({}, 2 * KEEP),
}
KINDS = ("matrix", "embedding", "vector", "token", "buffer", "fresh")
DIGESTS = 4  # bytes more that the digest of a base tensor had before


def method_of(keep: float, seed: int) -> dtrain.SeededSign:
    return dtrain.SeededSign(keep=keep, seed=seed, q="keep")


def jobs(names: Sequence[str], seeds: Sequence[int], shared: Path) -> Iterator[Job]:
    for seed in seeds:
        for name in names:
            for label in CODES:
                if name == "sst2" or not label.endswith(("method", "twice")):  # an image has no words
                    yield code_job(name, seed, shared, label)
    for seed in seeds:
        for ratio in RATIOS:
            for label, rules in (("before", BEFORE), ("default", dtrain.Rules())):
                if "sst2" in names:
                    yield size_job(seed, shared, ratio, label, rules)


def code_job(name: str, seed: int, shared: Path, label: str) -> Job:
    changed, keep = CODES[label]
    method = method_of(keep, seed)

    def measure() -> Cell:
        task = task_of(name, seed, shared)
        delta = dtrain.compress(task.base, task.tuned, method, rules=dtrain.Rules(**changed))
        return {**scored(task, delta), "base_change": base_change(name, seed, shared), "bytes": by_kind(delta)}

    settings = {"method": plain(method.describe()), "rules": plain(changed)}
    return Job(f"{name} | {seed} | {label}", settings, measure, ((name, seed),))


def size_job(seed: int, shared: Path, ratio: int, label: str, rules: dtrain.Rules) -> Job:
    def measure() -> Cell:
        task = task_of("sst2", seed, shared)
        encode = partial(dtrain.compress, task.base, task.tuned, rules=rules)
        probe = encode(method_of(KEEP, seed))
        most = probe.report().checkpoint_bytes // ratio
        keep = greatest_keep(lambda keep: size_of(probe, label) + grown(probe, keep), most)
        delta = encode(method_of(keep or 2**-20, seed))
        while keep is not None and size_of(delta, label) > most:
            keep = float(f"{0.9998 * keep:.6g}")
            delta = encode(method_of(keep, seed))
        return {"keep": keep, "file_bytes": size_of(delta, label), "bytes": by_kind(delta)}

    settings = {"ratio": ratio, "rules": plain(asdict(rules))}
    return Job(f"sst2 | {seed} | {ratio} | {label}", settings, measure, (("sst2", seed),))


def grown(probe: dtrain.Delta, keep: float) -> int:
    """Return how many bytes more a file has at `keep` than at `KEEP`, but for a few."""
    sizes = [
        math.prod(record.shape)
        for record in probe.content.records
        if any(not isinstance(item.pipeline.select, All) for item in record.payloads)
    ]
    return sum(math.ceil(size * keep / 8) - math.ceil(size * KEEP / 8) for size in sizes)


def size_of(delta: dtrain.Delta, label: str) -> int:
    """Return the bytes of the file, as it was with the longer digests where the rules are those of before."""
    backed = sum(record.role is not Role.WHOLE for record in delta.content.records)
    return delta.file_bytes() + (DIGESTS * backed if label == "before" else 0)


def by_kind(delta: dtrain.Delta) -> dict[str, int]:
    """Return payload bytes by kind of tensor."""
    rows = delta.report().rows
    return {kind: sum(row.payload_bytes for row in rows if row.kind == kind) for kind in KINDS}


@lru_cache
def base_change(name: str, seed: int, shared: Path) -> float:
    """Return how far the base's last hidden state is from the fine-tuned model's."""
    task = task_of(name, seed, shared)
    objective = task.objective()
    objective.remember()
    task.model.load_state_dict(task.base)
    return objective.loss()


def cells(results: Results, start: str, end: str) -> list[Cell]:
    """Return the cells of all seeds between two ends of a key."""
    found = results["cells"].items()
    return [cell for key, cell in found if key.startswith(f"{start} | ") and key.split(" | ", 2)[2] == end]


def code_rows(results: Results) -> list[list[str]]:
    out: list[list[str]] = []
    for name in ("sst2", "cifar"):
        for label in CODES:
            if found := cells(results, name, label):
                mean = [fmean(cell["bytes"][kind] for cell in found) for kind in ("embedding", "vector", "fresh")]
                changes = [cell["hidden_change"] / cell["base_change"] for cell in found]
                sizes = [f"{value:,.0f}" for value in (*mean, fmean(cell["file_bytes"] for cell in found))]
                scores = figure([cell["score"] for cell in found], 4)
                out.append([name, label, str(len(found)), *sizes, figure(changes, 4), scores])
    return out


def size_rows(results: Results) -> list[list[str]]:
    out: list[list[str]] = []
    for ratio in RATIOS:
        for label in ("before", "default"):
            if found := cells(results, "sst2", f"{ratio} | {label}"):
                sizes = [fmean(cell["bytes"][kind] for cell in found) for kind in KINDS]
                whole = fmean(cell["file_bytes"] for cell in found)
                keep = [cell["keep"] for cell in found]
                shown = "does not fit" if None in keep else f"1/{1 / fmean(keep):.1f}"
                words = [f"{size:,.0f}" for size in (*sizes, whole - sum(sizes), whole)]
                out.append([f"{ratio:,}x", label, str(len(found)), shown, *words])
    return out


def main() -> None:
    parser = parser_for(__doc__, choices=TASKS, nargs="+", default=["sst2", "cifar"])
    arguments = parser.parse_args()
    out = arguments.out or Path("bench/results/small_files.json")
    if not arguments.table:
        fill(out, chosen(jobs(arguments.task, arguments.seeds, arguments.shared), arguments.only), arguments.shared)
    results = read_results(out)
    if not results["references"]:
        parser.error(f"{out} holds no results yet. Run without --table to measure them.")
    header = ["task", "rules", "seeds", "embeddings", "vectors", "fresh", "file bytes", "hidden change", "score"]
    show(header, code_rows(results), caption(results), arguments.markdown)
    header = ["smaller", "rules", "seeds", "keep", *KINDS, "manifest", "file bytes"]
    show(header, size_rows(results), "bytes by kind of tensor, sst2, means over the seeds", arguments.markdown)


if __name__ == "__main__":
    main()
