"""Every place weights may come from, and a sentence for every place they cannot."""

import json
import pickle
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader

from dtrain import InputError
from dtrain.weights import digest, read_weights, tensor_bytes
from tests.artifact import reference_decoder
from tests.methods.settings import raw, same_bits, zoo

STATE = {"a.weight": torch.randn(3, 2), "a.bias": torch.zeros(3), "steps": torch.tensor(4)}
CHECKPOINT = {
    "epoch": 1,
    "pytorch-lightning_version": "2.6.6",
    "state_dict": OrderedDict(STATE),
    "loops": {"fit_loop": {"state_dict": {}}},
    "hyper_parameters": {"lr": 1e-3, "name": "x"},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
}


def index(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def sharded(path):
    names = {"a.weight": "1.safetensors", "a.bias": "2.safetensors", "steps": "2.safetensors"}
    folder = index(path / "sharded", {"weight_map": names})
    save_file({"a.weight": STATE["a.weight"]}, folder / "1.safetensors")
    save_file({"a.bias": STATE["a.bias"], "steps": STATE["steps"]}, folder / "2.safetensors")
    save_file({"other": torch.zeros(1)}, folder / "3.safetensors")
    return folder


def folder(path):
    (path / "folder").mkdir()
    save_file(STATE, path / "folder" / "model.safetensors")
    save_file({"other": torch.zeros(1)}, path / "folder" / "adapter.safetensors")
    return path / "folder"


def saved(content, name, **options):
    def write(path):
        torch.save(content, path / name, **options)
        return path / name

    return write


def module(path):
    root = nn.Module()
    root.a = nn.Linear(2, 3)
    root.register_buffer("steps", torch.tensor(0))
    root.register_buffer("scratch", torch.zeros(2), persistent=False)
    root.load_state_dict(STATE)
    return root


def file(path):
    save_file(STATE, path / "x.safetensors")
    return path / "x.safetensors"


SOURCES = {
    "module": module,
    "compiled module": lambda path: torch.compile(module(path)),
    "state dict": lambda path: STATE,
    "state dict of a compiled model": lambda path: {f"_orig_mod.{name}": value for name, value in STATE.items()},
    "with extra state": lambda path: STATE | {"_extra_state": {"x": 1}},
    "parameters": lambda path: {k: nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in STATE.items()},
    "safetensors": file,
    "path as text": lambda path: str(file(path)),
    "sharded folder": sharded,
    "folder": folder,
    "Lightning checkpoint": saved(CHECKPOINT, "last.ckpt"),
    "bare checkpoint": saved(STATE, "model.pt"),
    "bin": saved(STATE, "pytorch_model.bin"),
    "checkpoint of research code": saved({"model": STATE, "epoch": 3, "args": Namespace(lr=1e-3)}, "checkpoint-3.pth"),
    "as before torch 1.6": saved(STATE, "x.bin", _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_gives_the_same_weights(make, tmp_path):
    weights = read_weights(make(tmp_path))
    assert list(weights.tensors) == sorted(STATE)
    assert same_bits(weights.tensors, STATE)
    assert weights.aliases == {}
    assert not any(value.requires_grad for value in weights.tensors.values())
    assert read_weights(weights) is weights


class Fit(LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters({"lr": 0.1})
        self.net = nn.Linear(2, 3)

    def training_step(self, batch):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_that_lightning_wrote(tmp_path):
    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    model = Fit()
    trainer.fit(model, DataLoader(torch.randn(8, 2)))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    weights = read_weights(tmp_path / "last.ckpt")
    assert same_bits(weights.tensors, dict(sorted(model.state_dict().items())))


def test_tied_tensors_are_read_once(tmp_path):
    shared = torch.randn(3, 2)
    state = {"z": shared, "b": shared, "c": shared.clone(), "view": shared[:2], "turned": shared.t()}
    for source in (state, saved({"state_dict": state}, "x.ckpt")(tmp_path)):
        weights = read_weights(source)
        assert weights.aliases == {"z": "b"}
        assert list(weights.tensors) == ["b", "c", "turned", "view"]
        assert weights.get("z") is weights.tensors["b"]
        assert weights.get("none") is None


def test_empty_tensors_are_not_tied():
    assert read_weights({"a": torch.empty(0), "b": torch.empty(0), "c": torch.ones(1)}).aliases == {}


class Trap:
    fired = False

    def __reduce__(self):
        return (setattr, (Trap, "fired", True))


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.bin", "x"])
@pytest.mark.parametrize("bare", [True, False], ids=["pickle", "torch.save"])
def test_a_malicious_checkpoint_is_refused_and_not_executed(tmp_path, name, bare):
    content = {"state_dict": {"w": torch.zeros(1), "x": Trap()}}
    (tmp_path / name).write_bytes(pickle.dumps(content)) if bare else torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=f"{name} cannot be read as a checkpoint with weights_only=True"):
        read_weights(tmp_path / name)
    assert not Trap.fired


def cut(path):
    folder = sharded(path)
    (folder / "2.safetensors").write_bytes((folder / "2.safetensors").read_bytes()[:-3])
    return folder


def lost(path):
    (sharded(path) / "2.safetensors").unlink()
    return path / "sharded"


def misplaced(path):
    folder = sharded(path)
    save_file({"other": torch.zeros(1)}, folder / "2.safetensors")
    return folder


def written(name, content):
    def write(path):
        (path / name).write_bytes(content)
        return path / name

    return write


BAD = {
    "nothing there": (lambda path: path / "none.ckpt", "none.ckpt does not exist"),
    "empty folder": (lambda path: path, "holds no .safetensors file"),
    "missing shard": (lost, "lacks the shard 2.safetensors"),
    "cut shard": (cut, "2.safetensors cannot be read as safetensors"),
    "shard without its tensor": (misplaced, "a.bias"),
    **{
        f"index {content!r}": (lambda path, c=content: index(path / "folder", c), "index")
        for content in ("", "hello", {}, [], {"weight_map": 3}, {"weight_map": {"a": 1}}, {"weight_map": ["a"]})
    },
    "empty file": (written("x.safetensors", b""), "cannot be read as safetensors"),
    "text file": (written("x.safetensors", b"hello" * 9), "cannot be read as safetensors"),
    "empty checkpoint": (written("x.ckpt", b""), "cannot be read as a checkpoint"),
    "text checkpoint": (written("x.ckpt", b"hello"), "cannot be read as a checkpoint"),
    "tensor": (saved(torch.zeros(2), "x.pt"), "x.pt is not a checkpoint"),
    "list": (saved([torch.zeros(2)], "x.pt"), "x.pt is not a checkpoint"),
    "numbers as names": (saved({0: torch.zeros(2)}, "x.pt"), "x.pt"),
    "no tensors": (saved({"state_dict": {"a": 1}}, "x.ckpt"), "x.ckpt holds no tensors"),
    "empty state dict": (lambda path: {}, "state dict holds no tensors"),
    "module without weights": (lambda path: nn.ReLU(), "module ReLU holds no tensors"),
    "meta tensors": (lambda path: nn.Linear(2, 2, device="meta"), "on the meta device"),
    "one name twice": (lambda path: {"w": torch.zeros(2), "_orig_mod.w": torch.ones(2)}, "'w'"),
    "sparse tensors": (lambda path: {"w": torch.eye(2).to_sparse()}, "'w'"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore:Sparse")
def test_what_cannot_be_read_is_refused_with_a_sentence(make, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_weights(make(tmp_path))


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    with pytest.raises(InputError, match="index"):
        read_weights(index(tmp_path / "folder", {"weight_map": {"a": "../outside.safetensors"}}))


def test_digests_are_those_of_the_format():
    for name, value in (zoo()[0] | {"c": torch.randn(3, dtype=torch.complex64)}).items():
        dtype = str(value.dtype).removeprefix("torch.")
        assert digest(value) == reference_decoder.digest(dtype, value.shape, raw(value)), name
        assert tensor_bytes(value).numpy().tobytes() == raw(value)
