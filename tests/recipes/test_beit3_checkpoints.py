"""An official base and an official fine-tune, in their layout, through the command line: no training, no recipe."""

from argparse import Namespace
from dataclasses import replace

import pytest
import torch

import dtrain
from dtrain.cli import main
from parts.beit3 import POSITIONS, SMALL, Beit3, Beit3ForPairs
from parts.recipe import load

COMPRESS = ("compress", "base.pth", "tuned.pth", "delta.safetensors")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def checkpoints(request, tmp_path, monkeypatch):
    """Write base.pth, with a head of its pre-training, and tuned.pth, for larger images and with a head of the task."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    base = Beit3(SMALL).state_dict(prefix="beit3.")
    tuned = Beit3ForPairs(replace(SMALL, image_size=12))
    state = tuned.state_dict()
    for name, tensor in state.items():
        if name in base and name != POSITIONS:
            tensor.copy_(base[name] + 0.01 * torch.randn(tensor.shape))
    base["mlm_head.weight"] = torch.randn(64, 64)
    torch.save({"model": {name: value.to(request.param) for name, value in base.items()}}, "base.pth")
    tuned = {"model": {name: value.to(request.param) for name, value in state.items()}}
    torch.save(tuned | {"epoch": 9, "args": Namespace(task="nlvr2", lr=7e-4)}, "tuned.pth")
    return tuned["model"]


def test_they_compress_without_training(checkpoints, capsys):
    assert main([*COMPRESS, "--method", "SeededSign", "--method.keep", "0.2"]) == 0
    assert main(["apply", "base.pth", "delta.safetensors", "merged.safetensors"]) == 0
    merged = dtrain.read_weights("merged.safetensors").tensors
    assert merged.keys() == checkpoints.keys()  # without the head of the pre-training
    for name, tensor in checkpoints.items():
        assert (merged[name].shape, merged[name].dtype) == (tensor.shape, tensor.dtype), name
    for name in ("head.dense1.weight", POSITIONS):  # stored whole: a fresh head, a table of another size
        step = checkpoints[name].float().abs().amax() / 60  # 8 bits to a value
        assert (merged[name].float() - checkpoints[name].float()).abs().max() < step, name
    inspected = capsys.readouterr().out
    assert "delta.safetensors" in inspected


def test_the_merged_weights_are_a_model(checkpoints):
    assert main([*COMPRESS, "--method", "Lossless"]) == 0
    state = dtrain.load("delta.safetensors").state_dict(dtrain.read_weights("base.pth"))
    assert state.keys() == checkpoints.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoints.items())
    model = Beit3ForPairs(replace(SMALL, image_size=12))
    torch.save({"model": state}, "merged.pth")
    load(model, "merged.pth")
    images = torch.randn(2, 2, 3, 12, 12)
    logits = model(*images, torch.tensor([[0, 5, 2], [0, 2, 1]]), torch.tensor([[False] * 3, [False, False, True]]))
    assert logits.shape == (2, 2)
