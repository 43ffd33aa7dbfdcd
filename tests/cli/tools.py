"""What the tests of the command line share."""

from pathlib import Path

import torch


def shift(tensor):
    return (tensor + 2e-3 * torch.randn(tensor.shape)).to(tensor.dtype) if tensor.is_floating_point() else tensor


def files():
    return sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in Path().rglob("*"))


def same(state, other):
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def check_refusal(result, code, *words):
    """One sentence on standard error and nothing on standard output."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert err.startswith("dtrain: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for word in words:
        assert word in err
