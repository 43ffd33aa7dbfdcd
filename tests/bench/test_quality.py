"""`bench.quality` on a toy task: budgets hold, files are read back, losses come first, and a check finds changes."""

import json
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dtrain

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries of the real tasks warn while they are imported
NAME = "digits"  # what the toy stands in for
MODULES = ("check", "report", *(f"quality.{name}" for name in ("adapters", "budgets", "jobs", "entries", "found")))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.query, self.head = nn.Linear(8, 256), nn.Linear(256, 256), nn.Linear(256, 2)

    def forward(self, inputs):
        return self.head(self.query(self.first(inputs).relu()).relu())


@pytest.fixture
def bench(monkeypatch):
    """The modules, from the root of the checkout, with a toy in the place of every task."""
    sys.path.insert(0, str(ROOT))
    try:
        tasks = import_module("bench.tasks")
        modules = {name.rpartition(".")[2]: import_module(f"bench.{name}") for name in (*MODULES, "cells", "record")}
        modules |= {"tables": import_module("bench.quality.tables"), "lossless": import_module("bench.quality.peers")}
    finally:
        sys.path.remove(str(ROOT))
    known = {}

    def task_of(name, seed, shared, inputs=0):
        if seed not in known:
            torch.manual_seed(seed)
            model = Toy()
            base = tasks.snapshot(model)
            tuned = {key: value + 0.1 * torch.randn_like(value) for key, value in base.items()}
            inputs = list(torch.randn(4, 8, 8))
            val = [(batch, torch.randint(2, (8,))) for batch in inputs]
            training = tasks.Training(lambda: val, 4, 1e-3)
            scores = {"base": 0.5, "linear probe": 0.6, "fine-tuned": 0.9}
            right = tasks.share_right
            known[seed] = tasks.Task(name, seed, model, base, tuned, scores, inputs, val, right, training)
        return known[seed]

    for name in ("jobs", "check", "cells"):
        monkeypatch.setattr(modules[name], "task_of", task_of)
    return SimpleNamespace(**modules, task_of=task_of)


def fill(bench, folder, *labels, seeds=(0, 1)):
    jobs = [job for seed in seeds for label in labels for job in bench.jobs.jobs_of(NAME, seed, ROOT, label)]
    bench.cells.fill(folder / f"{NAME}.json", jobs, ROOT)
    return bench.found.read(folder, NAME)


def test_two_entries_are_within_the_budget_and_close_to_it(bench, tmp_path):
    chosen = bench.entries.CHOSEN
    found = fill(bench, tmp_path, chosen, "DARE, seeded")
    size = sum(tensor.numel() for tensor in Toy().state_dict().values())
    for label in (chosen, "DARE, seeded"):
        for cell in found.at(1.0, label).values():
            assert 0.95 * size / 8 < cell["file_bytes"] <= size / 8
            assert 0 <= cell["score"] <= 1
    assert "refused" in found.cells[f"0 | 0.015 | {chosen}"]
    before = (tmp_path / f"{NAME}.json").read_bytes()
    fill(bench, tmp_path, chosen, "DARE, seeded")
    assert (tmp_path / f"{NAME}.json").read_bytes() == before  # none is measured twice


def test_an_adapter_is_trained_and_loaded_from_its_file(bench, tmp_path):
    found = fill(bench, tmp_path, "LoRA on attention", "biases only", "linear probe", seeds=(0,))
    lora = found.at(1.0, "LoRA on attention")[0]
    assert lora["rank"] == lora["knob"] > 1
    assert lora["file_bytes"] <= lora["most"]
    biases = found.at(1.0, "biases only")[0]
    assert biases["file_bytes"] > found.at(1.0, "linear probe")[0]["file_bytes"] > 4 * (2 * 256 + 2)
    adapter, task = bench.adapters.ADAPTERS["LoRA on attention"], bench.task_of(NAME, 0, ROOT)
    model = adapter.wrap(task, 2)
    adapter.learn(task, model, 1e-2)
    adapter.save(model, tmp_path)
    inputs = task.val[0][0]
    assert torch.equal(adapter.load(task, tmp_path).eval()(inputs), model.eval()(inputs))
    assert not torch.equal(model(inputs), bench.adapters.fresh(task)(inputs))


def test_a_lossless_peer_gives_the_weights_back(bench, tmp_path):
    found = fill(bench, tmp_path, "zstd", "zstd on the xor", seeds=(0,))
    for label in ("zstd", "zstd on the xor"):
        cell = found.scored["own", label][0]
        assert cell["exact"]
        assert cell["score"] == 0.9
    peer = bench.lossless.PEERS["zstd"]
    broken = replace(peer, read=lambda task, folder: {**peer.read(task, folder), "head.bias": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"head\.bias comes back different"):
        broken.measure(bench.task_of(NAME, 0, ROOT), None)


def test_the_extra_installs_what_is_measured(bench):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    versions = sys.modules["bench.versions"].VERSIONS
    assert extras["peers"] == [f"{package}=={version}" for package, version in sorted(versions.items())]


def test_a_peer_of_another_version_is_not_measured(bench, monkeypatch):
    disk = sys.modules["bench.quality.peers.disk"]
    monkeypatch.setitem(disk.VERSIONS, "zstandard", "0.0.1")
    with pytest.raises(dtrain.InputError, match=r"zstandard 0\.0\.1 is measured, and .* is installed"):
        bench.lossless.PEERS["zstd"].measure(bench.task_of(NAME, 0, ROOT), None)


@pytest.mark.parametrize("slope", [1e6, 3e4, 1e3])
def test_the_greatest_knob_is_close_to_the_budget(bench, slope):
    size = lambda knob: 100 + round(slope * knob**0.9)  # noqa: E731
    tried = []
    knob = bench.budgets.greatest_knob(lambda knob: tried.append(knob) or size(knob), 500, 2**-20, 1.0)
    assert 0.98 * 500 < size(knob) <= 500
    assert len(tried) < 14
    assert bench.budgets.greatest_knob(size, 99, 2**-20, 1.0) is None
    assert bench.budgets.greatest_knob(size, 10**9, 2**-20, 1.0) == 1.0


def made(bench, scores):
    """Return results with the given scores by label, at 0.06 bit; what has no knob has 5 % more bytes."""
    cells = {}
    for label, values in scores.items():
        budget = "0.06" if bench.jobs.budgeted(bench.jobs.KINDS[label]) else "own"
        for seed, score in enumerate(values):
            bits = 0.063 if budget == "own" else 0.06
            cells[f"{seed} | {budget} | {label}"] = {"score": score, "bits_per_parameter": bits, "file_bytes": 600}
            cells[f"{seed} | {budget} | {label}"]["most"] = 600
    references = {seed: {"base": 0.5, "linear probe": 0.6, "fine-tuned": 0.9} for seed in range(3)}
    return bench.found.Found(NAME, references, cells)


def test_where_a_peer_wins_is_told_first_and_out_of_how_many(bench):
    chosen = bench.entries.CHOSEN
    lost = {chosen: (0.8, 0.8, 0.81), "DeltaDQ": (0.7, 0.7, 0.7), "deltatensors, one bit": (0.85, 0.84, 0.86)}
    found = made(bench, lost)
    peers = sum(bench.found.side_of(label) == "peer" for label in bench.jobs.KINDS)
    assert found.best(0.06, "peer") == ("deltatensors, one bit", 1, peers, None)
    assert found.best(0.03, "peer") == (None, 0, peers - 1, None)  # its file is too large, the others are not measured
    told = bench.tables.losses([found])
    assert told.startswith("**The best package, adapter or floor** is ahead of")
    assert "at 1 of 1 pairs of task and budget, at 1 of them" in told
    assert f"the best of 1 of {peers}, is ahead of 0.803" in told
    assert "-0.047 ± 0.014 (n = 3)" in told
    assert "**The best preset of a published method** is ahead of `SeededSign + parallel` at 0 of 1" in told
    row = next(line for line in bench.tables.headline(found).splitlines() if line.startswith("| 0.06"))
    assert "**-0.047 ± 0.014 (n = 3)**" in row
    assert "| +0.103 ± 0.014 (n = 3) |" in row
    won = bench.tables.losses([made(bench, lost | {chosen: (0.9, 0.9, 0.9)})])
    assert won.count("at 0 of 1 pairs of task and budget") == 2


def test_the_luckiest_of_single_seeds_is_not_the_best(bench):
    found = made(bench, {"DeltaDQ": (0.7, 0.7, 0.7), "DARE, seeded": (0.8,)})
    best = found.best(0.06, "stand-in")
    assert (best.label, best.compared, best.ahead) == ("DeltaDQ", 1, "DARE, seeded")
    assert "; with fewer seeds 0.800 (1 seed) dtrain's preset of DARE, seeded" in bench.tables.headline(found)


def test_what_gains_nothing_over_a_probe_is_not_counted_as_lost(bench):
    found = made(bench, {bench.entries.CHOSEN: (0.5,), "linear probe": (0.6,)})
    assert "linear probe" in bench.tables.losses([found])
    nothing = replace(found, references={0: {"base": 0.5, "linear probe": 0.6, "fine-tuned": 0.55}})
    assert "is not counted here" in (told := bench.tables.losses([nothing]))
    assert "at 0 of 0 pairs" in told


def test_what_was_measured_otherwise_is_not_shown(bench, tmp_path):
    found = fill(bench, tmp_path, bench.entries.CHOSEN, seeds=(0,))
    before = bench.tables.missing(found)[0]
    file = tmp_path / f"{NAME}.json"
    results = json.loads(file.read_text())
    key = next(key for key, cell in results["cells"].items() if "score" in cell)
    results["cells"][key]["settings"]["inputs"] += 1
    file.write_text(json.dumps(results))
    found = bench.found.read(tmp_path, NAME)
    assert key not in found.cells
    assert bench.tables.missing(found)[0] == before + 1


def test_two_runs_lose_no_cell_of_each_other(bench, tmp_path):
    jobs = [bench.record.Job(f"{run} | {i}", {}, lambda: {}) for run in range(2) for i in range(40)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda some: bench.record.fill(tmp_path / "file.json", some), (jobs[:40], jobs[40:])))
    assert len(bench.record.read_results(tmp_path / "file.json")["cells"]) == 80


def test_a_file_that_is_larger_than_the_budget_is_a_peers_only(bench):
    found = made(bench, {"BitDelta": (0.9,), "deltatensors, one bit": (0.8,), "Lossless": (0.9,)})
    assert found.at(0.06, "deltatensors, one bit")
    assert not found.at(0.06, "Lossless")
    assert not found.at(0.03, "deltatensors, one bit")
    assert found.at(0.25, "Lossless")
    assert bench.found.shown("BitDelta") == "dtrain's preset of BitDelta"


def test_a_task_of_ones_own_is_found_by_module_and_function(bench, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text("def pair(shared, seed, held_out, batch):\n    return (shared, seed)\n")
    monkeypatch.syspath_prepend(tmp_path)
    find = sys.modules["bench.tasks"].task
    assert find("my_tasks:pair", ROOT, 3) == (ROOT, 3)
    for name in ("my_tasks:nothing", "nowhere:pair", "sst3"):
        with pytest.raises(dtrain.InputError, match=f"no task '{name}'.*sst2"):
            find(name, ROOT, 0)


def test_an_interval_is_students(bench):
    assert bench.tables.interval([0.1, 0.2, 0.3]) == "+0.200 ± 0.248 (n = 3)"
    assert bench.tables.interval([0.1]) == "+0.100 (one seed)"


def test_the_report_has_a_plot_and_a_table_of_every_task(bench, tmp_path, monkeypatch):
    folder = tmp_path / "bench/results/quality"
    folder.mkdir(parents=True)
    fill(bench, folder, bench.entries.CHOSEN, "DeltaDQ", "linear probe", seeds=(0,))
    (tmp_path / "README.md").write_text("before\n<!-- results -->\nold\n<!-- /results -->\nafter\n")
    monkeypatch.setattr(sys, "argv", ["report", "--root", str(tmp_path)])
    bench.report.main()
    text = (tmp_path / "RESULTS.md").read_text()
    assert text.index("Where we lose") < text.index("### digits")
    assert (tmp_path / "docs/results/quality_digits.png").stat().st_size > 10_000
    assert "dtrain's preset of DeltaDQ" in (tmp_path / "docs/results/digits.md").read_text()
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n<!-- results -->\n| bit of file per parameter")
    assert readme.endswith("<!-- /results -->\nafter\n")
    assert "old" not in readme


def test_a_check_measures_again_and_says_what_differs(bench, tmp_path, capsys):
    fill(bench, tmp_path, "SeededSign", "linear probe", seeds=(0,))
    arguments = ["--results", str(tmp_path), "--each", "20"]
    assert bench.check.main(arguments) == 0
    results = json.loads((tmp_path / f"{NAME}.json").read_text())
    results["cells"]["0 | 1 | SeededSign"]["file_bytes"] -= 1000
    results["cells"]["0 | own | linear probe"]["score"] = 0.05
    (tmp_path / f"{NAME}.json").write_text(json.dumps(results))
    assert bench.check.main(arguments) == 1
    told = capsys.readouterr().err
    assert "bytes, and" in told
    assert "a score of 0.6000, and 0.0500 is checked in" in told
    assert bench.check.main(["--results", str(tmp_path / "none")]) == 1
    assert "no cell that could be measured again" in capsys.readouterr().err
