"""DeltaCompressionCallback on two processes: one file, the same numbers on every rank, those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import dtrain
from tests.callbacks.spread import Pulled, run, told

pytestmark = [
    pytest.mark.multiproc,
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*Missing logger folder.*"),
]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder


@pytest.fixture(scope="module")
def spawned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spawned")
    run(folder, 2, "ddp_spawn")
    return folder


def compare(alone, together):
    (one,), (first, second) = told(alone), told(together)
    assert first["weights"] == second["weights"] == one["weights"]
    for method in ("Dare", "DareX", "SeededSign"):
        assert first[method] == second[method]
        assert first[method]["fingerprint"] == one[method]["fingerprint"]
    for name, value in first["logged"].items():
        if name not in ("val_mine", "val_first_rank"):
            assert first["Dare"]["scores"]["finetuned"][name] == value
    for method in ("Dare", "DareX", "SeededSign"):
        for who, scores in first[method]["scores"].items():
            within = 1e-2 if method == "SeededSign" else 1e-4  # it learns from one batch after the other
            assert scores == pytest.approx(one[method]["scores"][who], rel=within), (method, who)
    for method in ("DareX", "SeededSign"):  # of the same inputs, if in other batches
        assert first[method]["fit"]["start"] == pytest.approx(one[method]["fit"]["start"], rel=1e-4)
    assert first["DareX"]["fit"]["q"] == pytest.approx(one["DareX"]["fit"]["q"], rel=1e-4)
    for folder in (alone, together):
        assert (folder / "dare.safetensors").read_bytes() == (alone / "dare.safetensors").read_bytes()
        assert sorted(path.name for path in folder.glob("*.safetensors*")) == [
            *("dare.safetensors", "delta.safetensors", "sign.safetensors"),
        ]
        assert not list(folder.rglob("*.dtrain-tmp"))
        dtrain.load(folder / "delta.safetensors").verify(Pulled())
        assert len(list(folder.glob("checkpoints/dtrain-base-*"))) == 1


def test_spawned(alone, spawned):
    compare(alone, spawned)


def test_a_metric_of_the_first_rank_alone(spawned):
    assert told(spawned)[1]["Dare"]["scores"]["base"]["val_first_rank"] == 3.0


def test_launched_and_resumed(alone, tmp_path):
    script = [sys.executable, "-m", "tests.callbacks.spread", str(tmp_path)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("gain kept") == 6  # two runs, three callbacks, one rank
    compare(alone, tmp_path)
