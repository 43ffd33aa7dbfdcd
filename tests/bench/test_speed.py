"""bench.speed on tiny models: every cell can be measured, what is timed is right, and table and picture are made."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def speed():
    """The modules, which are imported from the root of the checkout."""
    sys.path.insert(0, str(ROOT))
    try:
        from bench import record
        from bench.speed import child, contenders, measure, pairs, peers, plot, tables
    finally:
        sys.path.remove(str(ROOT))
    found = (record, child, contenders, measure, pairs, peers, plot, tables)
    return {module.__name__.rpartition(".")[2]: module for module in found}


@pytest.fixture(params=["bfloat16", "float32"])
def pair(speed, request, tmp_path):
    speed["pairs"].make(tmp_path, speed["child"].TINY, getattr(torch, request.param))
    return speed["pairs"].Pair(tmp_path, tmp_path)


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_all_cells_are_measured_and_shown(speed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(speed["pairs"].SIZES, "20M", speed["child"].TINY)
    monkeypatch.setattr(
        speed["measure"], "ask", lambda settings, folder: speed["child"].answer({**settings, "folder": str(folder)})
    )
    monkeypatch.setattr(speed["child"].gc, "collect", lambda: 0)  # all of torch is looked through each time
    for dtype in ("bfloat16", "float32"):
        jobs = list(speed["measure"].jobs(dtype, "20M", peers=False, most=1))
        file = speed["tables"].file_of(dtype, "20M")
        speed["record"].fill(file, jobs)
        speed["record"].fill(file, [replace(job, measure=lambda: pytest.fail("measured twice")) for job in jobs])
        cells = json.loads(file.read_text())["cells"]
        assert list(cells) == [job.key for job in jobs]
        for key, cell in cells.items():
            assert cell["machine"].keys() == {"cpu", "cores", "load", "torch", "python"}
            if key.partition(" ")[0] in ("write", "read", "swap", "step"):
                check_times(cell)
    text = speed["tables"].markdown()
    for contender in (*speed["contenders"].MAIN, *speed["contenders"].METHODS):
        assert f"| {contender.name}" in text
    for title in (*speed["tables"].TITLES.values(), "Memory beyond", "A step of AdamR", "slowest"):
        assert title in text
    speed["plot"].draw(tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def check_times(cell):
    found, rounds = cell["found"], cell["settings"]["rounds"]
    assert {"memory copy", *cell["settings"]["contenders"]} == found.keys()
    for row in found.values():
        assert row["bytes"] > 0
        for values in row["steps"].values():
            assert len(values) == rounds
            assert all(seconds >= 0 and processor >= 0 for seconds, processor in values)


def test_nothing_measured_is_said(speed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "Nothing has been measured" in speed["tables"].markdown()


def test_timed_weights_are_those_that_apply_gives(speed, pair):
    contenders = speed["contenders"]
    for contender in (*contenders.MAIN, *contenders.METHODS, speed["peers"].Zstandard()):
        contenders.run(contender.write(pair))
        state = contenders.run(contender.read(pair))
        for step in contender.swap(pair):
            expected = {"apply": state, "remove": pair.base}.get(step)
            assert expected is None or equal(pair.module.state_dict(), expected), f"{contender.name}: {step}"
        if contender.kind != "dtrain" or "Lossless" in contender.name:
            assert equal(state, pair.tuned), contender.name
        else:
            assert not equal(state, pair.base), contender.name


def test_a_process_of_its_own_answers(speed, pair, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {"dtype": str(pair.dtype)[6:], "size": "20M", "threads": 1, "operation": "memory", "rounds": 1}
    found = speed["measure"].ask({**settings, "contenders": ["dtrain SeededSign"]}, pair.folder)
    assert {what: set(steps) for what, steps in found.items()} == {
        "write": {"compress", "save"},
        "read": {"load", "rebuild"},
        "swap": {"apply", "remove"},
    }


def test_the_made_up_delta_is_like_a_real_one(speed, pair):
    flat = [torch.cat([t.float().reshape(-1) for t in state.values()]) for state in (pair.base, pair.tuned)]
    change = flat[1] - flat[0]
    assert float(change.square().mean().sqrt()) == pytest.approx(5e-4, rel=0.1)
    zeros = float((change == 0).float().mean())
    assert zeros == pytest.approx(0.38, abs=0.02) if pair.halves else zeros < 0.01


def test_ratios_are_of_the_same_round(speed):
    tables = speed["tables"]
    row = {"steps": {"compress": [[2, 4], [9, 30]], "save": [[1, 2], [1, 0]]}}
    floor = {"steps": {"copy": [[1, 1], [1, 10]]}}
    assert tables.totals(row, 0) == [3, 10]
    assert tables.ratio(row, floor) == pytest.approx((6 + 3) / 2)
    assert tables.ratio(row, floor, "compress") == pytest.approx((4 + 3) / 2)
    assert tables.rate(row, 6_000_000) == pytest.approx(2)
