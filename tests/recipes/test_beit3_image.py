"""The BEiT-3 recipe for images as a user runs it: local folders of every kind, resumed, evaluated, refused."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import dtrain
from dtrain.cli import main
from parts import beit3_vision
from parts.beit3_vision import load_beit3_vision
from parts.images import Images

# Lightning and its loggers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1, "num_classes": 3}


def small_beit3() -> torch.nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("beit3_base_patch16_224", **SIZES)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def write_images(root: Path, splits: dict[str, dict[str, int]]) -> Path:
    """Pictures of many sizes; a class is a brightness."""
    generator = np.random.default_rng(0)
    for split, classes in splits.items():
        for number, (name, count) in enumerate(classes.items()):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 60, (17 + index, 20 + number, 3), dtype=np.uint8) + np.uint8(60 * number)
                Image.fromarray(pixels).save(root / split / name / f"{index:03}.jpg")
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in timm's layout, and a tiny data set in ImageNet's."""
    root = tmp_path_factory.mktemp("local")
    write_images(root / "data", {"train": {"ant": 40, "bee": 40, "cat": 40}, "val": {"ant": 9, "bee": 9, "cat": 9}})
    (root / "model").mkdir()
    config = {"architecture": "beit3_base_patch16_224", "num_classes": 3, "model_args": SIZES, "pretrained_cfg": {}}
    (root / "model" / "config.json").write_text(json.dumps(config))
    save_file(small_beit3().state_dict(), root / "model" / "model.safetensors")
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the recipe's command line in this process, in a folder of its own, and return what it prints."""

    def run(*arguments: str, cwd: str = ".") -> str:
        local = ["--data.dataset", str(folders / "data"), "--data.classes=[]", "--data.image_size=16"]
        short = ["--trainer.max_steps=6", "--data.batch_size=16", "--data.calibration=32", "--trainer.accelerator=cpu"]
        (tmp_path / cwd).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("COLUMNS", "120")
        base = ["--model.pretrained", str(folders / "model"), "--fit.steps=4"]
        monkeypatch.setattr(sys, "argv", ["beit3_image.py", "--preset=offline", *local, *base, *short, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "recipes" / "beit3_image.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.startswith("preset: offline (as asked)")
        return printed.out

    return run


def score(output: str) -> float:
    return float(re.search(r"val_acc\s*│\s*([\d.]+)", output)[1])


def test_the_file_gives_the_same_accuracy_once_it_is_applied(recipe, folders, tmp_path):
    printed = recipe()
    compressed = float(re.search(r"val_acc[^\n]*│\s*([\d.]+)\s*│[^│\n]*│\s*$", printed, re.MULTILINE)[1])
    delta = tmp_path / "runs/beit3_image/delta.safetensors"
    metadata = dtrain.load(delta).content.metadata
    assert (metadata["method"]["name"], metadata["fit"]["name"]) == ("SeededSign", "Learn")
    assert "data: 27 images" in printed
    assert f"{delta.stat().st_size:,}" in printed
    assert main(["apply", str(folders / "model"), str(delta), "merged.safetensors"]) == 0
    assert score(recipe("--evaluate", "merged.safetensors")) == pytest.approx(compressed, abs=5e-5)


def test_printed_config_is_complete(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--config", str(ROOT / "recipes" / "beit3_image.yaml"), "--print_config")
    printed = capsys.readouterr().out
    for key in ("method:", "adamr:", "compress:", "pretrained:", "workers: 0", "crop: 1.0", "strength: 0.001"):
        assert key in printed


def test_the_hub_preset_says_what_timm_says_of_its_base():
    presets = runpy.run_path(str(ROOT / "recipes" / "beit3_image.py"))["PRESETS"]
    hub = presets["hub"]
    config = timm.get_pretrained_cfg(hub["model.pretrained"])
    assert (tuple(hub["data.mean"]), tuple(hub["data.std"]), hub["data.crop"]) == (
        config.mean,
        config.std,
        config.crop_pct,
    )
    assert config.input_size == (3, hub["data.image_size"], hub["data.image_size"])
    assert config.interpolation == "bicubic"
    assert config.hf_hub_id


def broken(tmp_path: Path, what: str) -> tuple[str, str]:
    """Arguments that cannot work."""
    splits = {"train": {"ant": 30, "bee": 30}, "val": {"ant": 2, "bee": 2}}
    if what == "val class missing":
        del splits["val"]["bee"]
    if what == "val missing":
        del splits["val"]
    if what == "other classes":
        splits["val"] = {"ant": 2, "cow": 2}
    if what == "empty class":
        splits["train"]["bee"] = 0
    root = write_images(tmp_path / "images", splits)
    if what in ("unreadable", "workers"):
        (root / "train" / "bee" / "003.jpg").write_bytes(b"no image")
    if what == "cut short":
        whole = root / "val" / "ant" / "000.jpg"
        whole.write_bytes(whole.read_bytes()[:300])
    return "--data.dataset", str(root)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            "val class missing",
            r"2 class folders in train and 1 in val; expected the same ones. Only train has \['bee'\]",
        ),
        ("val missing", r"2 class folders in train and 0 in val.*Only train has \['ant', 'bee'\]"),
        ("other classes", r"expected the same ones. Only train has \['bee'\]"),
        ("empty class", r"Found no valid file for the classes bee"),
        ("unreadable", r"bee/003.jpg cannot be read as an image"),
        ("cut short", r"ant/000.jpg cannot be read as an image"),
        ("workers", r"^beit3_image: \S+bee/003.jpg cannot be read as an image"),
    ],
)
def test_bad_folders_get_a_sentence(recipe, tmp_path, what, sentence):
    with pytest.raises(SystemExit, match=sentence):
        recipe(*broken(tmp_path, what), f"--data.workers={int(what == 'workers')}")
    assert not list(tmp_path.rglob("delta.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data.image_size=0",), "may have many sizes"),
        (("--data.image_size=32",), "takes images of 16 pixels and gets 32. Try --data.image_size 16"),
        (("--data.dataset=digits", "--data.image_size=0"), "takes images of 16 pixels and gets 8"),
        (("--data.classes=[0, 7]",), r"names \[7\], but .* has 3 class folders"),
        (("--model.pretrained=no_such_model_anywhere",), "no_such_model_anywhere"),
        (("--model.pretrained=no_such_file.pth",), "no_such_file.pth"),
    ],
)
def test_bad_input_gets_a_sentence(recipe, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        recipe(*arguments)


def test_folders_of_images_are_decoded_as_timm_evaluates(folders):
    data = Images(str(folders / "data"), image_size=16, batch_size=16, calibration=30, crop=0.9, workers=1)
    assert data.num_classes == 3
    assert [len(data.part(name)) for name in ("train", "calibration", "val")] == [90, 30, 27]
    assert not set(data.part("train").indices) & set(data.part("calibration").indices)
    images, labels = next(iter(data.train_dataloader()))
    assert (images.shape, images.dtype, labels.dtype) == ((16, 3, 16, 16), torch.uint8, torch.int64)
    assert torch.equal(labels, images.flatten(1).float().mean(1).sub(30).div(60).round().long())
    transform = timm.data.create_transform(
        (3, 16, 16), crop_pct=0.9, interpolation="bicubic", mean=data.mean, std=data.std
    )
    split = data.part("val").dataset
    with Image.open(split.samples[5][0]) as picture:
        expected = transform(picture)
    assert torch.allclose(data.normalise((split[5][0][None], labels))[0][0], expected, atol=1e-6)
    some = Images(str(folders / "data"), classes=[2, 0], image_size=16, batch_size=16, calibration=8)
    assert some.num_classes == 2
    bright = [int(image.float().mean() < 90) for image, _ in some.part("val")]
    assert [label for _, label in some.part("val")] == bright


def official(model: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of a vision tower by the names of the original checkpoints, with a text half beside it."""
    names = [("patch_embed.", "vision_embed."), ("cls_token", "vision_embed.cls_token")]
    inside = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "attn.norm": "self_attn.inner_attn_ln"}
    inside |= {"attn.proj": "self_attn.out_proj", "mlp.norm": "ffn.A.ffn_layernorm"}
    inside |= {"mlp.fc1": "ffn.A.fc1", "mlp.fc2": "ffn.A.fc2"}
    tensors: dict[str, Tensor] = {"beit3.text_embed.weight": torch.ones(9, 64), "mlm_head.weight": torch.ones(9, 64)}
    for name, tensor in model.state_dict().items():
        if name == "pos_embed":
            tensors["beit3.encoder.embed_positions.A.weight"] = torch.cat([torch.zeros(2, 64), tensor[0]])
        elif match := re.fullmatch(r"blocks\.(\d+)\.(.*)\.(weight|bias)", name):
            layer, part, kind = match.groups()
            if part == "attn.qkv":
                for letter, chunk in zip("qkv", tensor.chunk(3), strict=True):
                    tensors[f"beit3.encoder.layers.{layer}.self_attn.{letter}_proj.A.{kind}"] = chunk.clone()
                continue
            where = inside[part] if ".A." in inside[part] else f"{inside[part]}.A"
            tensors[f"beit3.encoder.layers.{layer}.{where}.{kind}"] = tensor
        elif name.startswith(("patch_embed.", "cls_token")):
            for ours, theirs in names:
                if name.startswith(ours):
                    tensors["beit3." + name.replace(ours, theirs)] = tensor
        else:
            tensors[name] = tensor  # fc_norm and head of a fine-tuned checkpoint
    text = {name.replace(".A.", ".B."): torch.zeros_like(tensor) for name, tensor in tensors.items() if ".A." in name}
    return tensors | text


def test_an_official_checkpoint_gives_the_same_features(tmp_path):
    model = small_beit3().eval()
    tensors = official(model)
    torch.save({"model": tensors}, tmp_path / "beit3.pth")
    loaded = load_beit3_vision(str(tmp_path / "beit3.pth"), 5).eval()
    images = torch.randn(2, 3, 16, 16)
    assert loaded.head.weight.shape == (5, 64)
    assert torch.equal(loaded.forward_features(images), model.forward_features(images))
    assert torch.equal(loaded.fc_norm.weight, model.fc_norm.weight)
    for name in ("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"):  # what is only pre-trained has none
        del tensors[name]
    torch.save(tensors, tmp_path / "pretrained.pth")
    fresh = load_beit3_vision(str(tmp_path / "pretrained.pth"), 5).eval()
    assert torch.equal(fresh.forward_features(images), model.forward_features(images))
    assert torch.equal(fresh.fc_norm.weight, torch.ones(64))
    del tensors["beit3.encoder.layers.1.ffn.A.fc2.bias"]
    torch.save(tensors, tmp_path / "damaged.pth")
    with pytest.raises(dtrain.InputError, match=r"blocks.1.mlp.fc2.bias has the shape .* no such tensor"):
        load_beit3_vision(str(tmp_path / "damaged.pth"), 5)
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(dtrain.InputError, match="is no checkpoint of BEiT-3"):
        load_beit3_vision(str(tmp_path / "other.pth"), 5)


def test_a_folder_gets_a_fresh_head_and_must_be_a_beit3(folders, tmp_path):
    model = load_beit3_vision(str(folders / "model"), 3)
    saved = load_file(folders / "model" / "model.safetensors")
    assert torch.equal(model.blocks[0].attn.norm.weight, saved["blocks.0.attn.norm.weight"])
    assert torch.equal(model.fc_norm.weight, saved["fc_norm.weight"])
    assert not torch.equal(model.head.weight, saved["head.weight"])  # also where the number of classes is the same
    shutil.copytree(folders / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(dtrain.InputError, match="No suitable checkpoints"):
        load_beit3_vision(str(tmp_path / "model"), 3)
    plain = timm.models.vision_transformer.VisionTransformer(**SIZES)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_args": SIZES}))
    save_file(plain.state_dict(), tmp_path / "model" / "model.safetensors")
    with pytest.raises(dtrain.InputError, match="is no BEiT-3"):
        load_beit3_vision(str(tmp_path / "model"), 3)


def test_the_small_base_is_a_beit3_of_timms_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pretrain = beit3_vision.pretrain_on_digits
    monkeypatch.setattr(beit3_vision, "pretrain_on_digits", lambda *arguments: pretrain(*arguments, steps=2))
    before = torch.get_rng_state()
    first = load_beit3_vision("digits", 5)
    assert first.fc_norm.normalized_shape == (96,)
    assert isinstance(first.norm, torch.nn.Identity)
    torch.set_rng_state(before)
    cached = load_beit3_vision("digits", 5)  # whether it was cached changes nothing
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), cached.parameters(), strict=True))


def test_without_a_network_the_hub_preset_says_what_to_do(recipe, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, sentence in (
        ("in22k_ft_in1k", "cannot be downloaded .* --preset offline"),
        ("no_tag", "no weights called"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            recipe(f"--model.pretrained=beit3_base_patch16_224.{name}")
