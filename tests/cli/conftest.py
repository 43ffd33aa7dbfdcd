import pytest
import torch
from safetensors.torch import save_file

from dtrain.cli import main
from tests.cli.tools import shift


@pytest.fixture(autouse=True)
def pair(tmp_path, monkeypatch):
    """Two models in the working folder: matrices, vectors, an integer buffer, a frozen table and a fresh head."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    base = {f"layers.{i}.{kind}.weight": torch.randn(32, 48) * 0.02 for i in range(2) for kind in ("up", "down")}
    base |= {"norm.bias": torch.randn(32), "table.weight": torch.randn(9, 32), "ids": torch.arange(5)}
    base |= {"half.weight": torch.randn(16, 16).bfloat16(), "wide.weight": torch.randn(8, 8, dtype=torch.float64)}
    tuned = {name: shift(tensor) for name, tensor in base.items()}
    tuned |= {"table.weight": base["table.weight"], "head.weight": torch.randn(3, 32), "head.bias": torch.randn(3)}
    save_file(base, "base.safetensors")
    save_file(tuned, "tuned.safetensors")
    return base, tuned


@pytest.fixture
def run(capsys):
    """Run one command line and return (exit code, standard output, standard error)."""

    def call(*argv):
        capsys.readouterr()  # what the test's own preparations said
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def delta(run):
    """The name of a delta file between the two models."""
    assert run("compress", "base.safetensors", "tuned.safetensors", "delta.safetensors")[0] == 0
    return "delta.safetensors"
