"""The experiments on a toy task: every cell is measured, none twice, and the figures over seeds are right."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import dtrain

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries of the real tasks warn while they are imported


@pytest.fixture(scope="module")
def bench():
    """The modules, which are imported from the root of the checkout."""
    sys.path.insert(0, str(ROOT))
    try:
        from bench import cells, family, ratios, scales, tasks
    finally:
        sys.path.remove(str(ROOT))
    return {module.__name__.rpartition(".")[2]: module for module in (cells, family, ratios, scales, tasks)}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 512), nn.Linear(512, 512), nn.Linear(512, 2)

    def forward(self, inputs):
        return self.head(self.second(self.first(inputs).relu()).relu())


@pytest.fixture
def toy(bench, monkeypatch):
    """Put a toy in the place of every task, and fits of a few steps in the place of all that learn."""

    def task_of(name, seed, shared, inputs=0):
        torch.manual_seed(seed)
        model = Toy()
        base = bench["tasks"].snapshot(model)
        tuned = {key: value + 0.1 * torch.randn_like(value) for key, value in base.items()}
        batches = list(torch.randn(4, 8, 8))
        val = [(batch, torch.randint(2, (8,))) for batch in batches]
        scores = {"base": 0.5, "linear probe": 0.6, "fine-tuned": 0.9}
        return bench["tasks"].Task(name, seed, model, base, tuned, scores, batches, val, bench["tasks"].share_right)

    def short(fit):
        return replace(fit, steps=2, every=1) if isinstance(fit, dtrain.Learn) else fit

    for name in ("cells", "family", "ratios", "scales"):
        monkeypatch.setattr(bench[name], "task_of", task_of)
    for name in ("family", "scales"):
        ways = tuple(tuple(replace(way, fit=short(way.fit)) for way in group) for group in bench[name].GROUPS)
        monkeypatch.setattr(bench[name], "GROUPS", ways)
    monkeypatch.setattr(bench["family"], "INDEPENDENT", bench["family"].GROUPS[0][1])
    monkeypatch.setattr(bench["ratios"], "FITS", {k: (o, short(fit)) for k, (o, fit) in bench["ratios"].FITS.items()})
    monkeypatch.setattr(bench["family"], "KEEPS", (1 / 32,))
    monkeypatch.setattr(bench["ratios"], "RATIOS", (10, 10_000))
    return bench


def measured(toy, jobs, out):
    """Measure the jobs, then see that nothing is left to measure, and return the results."""
    toy["cells"].fill(out, jobs, ROOT)
    before = out.read_bytes()
    toy["cells"].fill(out, [replace(job, measure=lambda: pytest.fail("measured twice")) for job in jobs], ROOT)
    assert out.read_bytes() == before
    return json.loads(before)


def test_scales_measures_every_fit_at_the_same_bytes(toy, tmp_path):
    scales = toy["scales"]
    hosts = ("0.04 bit | 0 | SeededSign", "all | 0 | BitDelta")
    jobs = [job for job in scales.jobs("sst2", [0], ROOT) if job.key.startswith(hosts)]
    results = measured(toy, jobs, tmp_path / "scales.json")
    assert len(results["cells"]) == len(jobs)
    assert not [key for key, cell in results["cells"].items() if "refused" in cell]
    for host in hosts:
        plain, shifted = (results["cells"][f"{host} | {way}"] for way in ("none", "DBMS, lam 1, eta 1"))
        assert shifted["file_bytes"] <= plain["file_bytes"]
    lines = scales.rows("sst2", results)
    assert len(lines) == len(jobs)
    assert all(len(line) == len(scales.HEADER) for line in lines)


def test_ratios_counts_every_byte_and_says_what_does_not_fit(toy, tmp_path):
    ratios = toy["ratios"]
    results = measured(toy, list(ratios.jobs(("sst2",), [0, 1], ROOT)), tmp_path / "ratios.json")
    size = sum(tensor.numel() * 4 for tensor in Toy().state_dict().values())
    for key, cell in results["cells"].items():
        if "| 10 |" in key:
            assert cell["file_bytes"] <= size // 10
        else:
            assert "next to no weight kept" in cell["refused"]
    assert all(len(line) == len(ratios.HEADER) for line in ratios.ratio_rows(results))
    assert len(ratios.bytes_rows(results)) == 2


def test_family_stores_the_shared_vector_once_and_no_more_bytes(toy, tmp_path):
    family = toy["family"]
    results = measured(toy, list(family.jobs([0], ROOT)), tmp_path / "family.json")
    for key, cell in results["cells"].items():
        if "tasks" in cell:
            assert cell["total_bytes"] == cell["shared_bytes"] + sum(c["file_bytes"] for c in cell["tasks"].values())
            assert bool(cell["shared_bytes"]) == ("shared" in key)
    assert all(len(line) == len(family.HEADER) for line in family.rows(results))


def test_the_greatest_keep_is_the_greatest_that_fits(bench):
    greatest_keep = bench["cells"].greatest_keep
    size = lambda keep: 100 + round(1e6 * keep)  # noqa: E731
    keep = greatest_keep(size, 12_345)
    assert size(keep) <= 12_345 < size(keep * 1.0011)
    assert greatest_keep(size, 99) is None
    assert greatest_keep(size, 10**7) == 1.0


def test_figures_over_seeds(bench):
    cells = bench["cells"]
    assert cells.figure([0.5, 0.7]) == "0.600 ± 0.141"
    assert cells.difference([0.5, 0.7], [0.4, 0.4]) == "+0.200 ± 0.100"
    ratio, error = cells.share([0.2, 0.4], [0.4, 0.4])
    assert ratio == pytest.approx(0.75)
    assert error == pytest.approx(0.1 / 0.4)  # equal gains: the standard error of the mean over the gain
    assert cells.share([0.2], [0.4]) == (0.5, None)
    assert cells.share([0.1], [-0.1]) is None
    assert math.isclose(cells.share([0.3, 0.3], [0.3, 0.3])[1], 0.0)
