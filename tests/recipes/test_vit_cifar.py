"""The ViT recipe as a user runs it: offline, from local folders, resumed, evaluated, with W&B offline."""

import errno
import json
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pil
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

import dtrain
from dtrain.cli import main
from parts.images import Images
from parts.vision_models import load_vit, pretrain_on_digits

# Lightning and its loggers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
MODEL = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a tiny data set in the layouts of the Hub."""
    root = tmp_path_factory.mktemp("local")
    generator = np.random.default_rng(0)
    splits = {}
    for name, count in (("train", 240), ("test", 60)):
        labels = [i % 10 for i in range(count)]
        pictures = [generator.integers(0, 60, (8, 8, 3), dtype=np.uint8) + np.uint8(19 * label) for label in labels]
        rows = {"img": [Pil.fromarray(picture) for picture in pictures], "label": labels}
        splits[name] = Dataset.from_dict(rows, features=Features({"img": Image(), "label": Value("int64")}))
    for name, split in DatasetDict(splits).items():
        (root / "data").mkdir(exist_ok=True)
        split.to_parquet(root / "data" / f"{name}.parquet")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps({"model_args": MODEL}))
    torch.manual_seed(0)
    save_file(VisionTransformer(**MODEL).state_dict(), root / "model" / "model.safetensors")
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the recipe's command line in this process, in a folder of its own, and return what it prints."""

    def run(*arguments: str, cwd: str = ".") -> str:
        local = ["--data.dataset", str(folders / "data"), "--model.pretrained", str(folders / "model")]
        short = ["--trainer.max_steps=12", "--data.batch_size=32", "--data.calibration=32", "--trainer.accelerator=cpu"]
        (tmp_path / cwd).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["vit_cifar.py", "--preset=offline", *local, *short, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "recipes" / "vit_cifar.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.startswith("preset: offline (as asked)")
        return printed.out

    return run


def score(output: str) -> float:
    return float(re.search(r"val_acc\s*│\s*([\d.]+)", output)[1])


def test_the_file_gives_the_same_accuracy_once_it_is_applied(recipe, folders, tmp_path):
    printed = recipe("--method.masks=1", "--compress.calibration_batches=1")
    compressed = float(re.search(r"val_acc[^\n]*│\s*([\d.]+)\s*│[^│\n]*│\s*$", printed, re.MULTILINE)[1])
    delta = tmp_path / "runs/vit_cifar/delta.safetensors"
    assert (tmp_path / "runs/vit_cifar/score_against_bytes.png").stat().st_size > 10_000
    assert f"{delta.stat().st_size:,}" in printed
    assert main(["apply", str(folders / "model"), str(delta), "merged.safetensors"]) == 0
    assert score(recipe("--evaluate", "merged.safetensors")) == pytest.approx(compressed, abs=5e-5)


@pytest.mark.parametrize(
    "method", [("SeededSign",), ("Dbms", "--method.host=DareX", "--method.host.keep=0.2")], ids=lambda method: method[0]
)
def test_learnt_scales_are_resumed_bit_for_bit(recipe, tmp_path, method):
    name, *rest = method
    common = ("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--checkpoint.save_top_k=-1", "--compare=false")
    learn = (f"--method={name}", *rest, "--fit=Learn", "--fit.steps=4")  # of the 32 rows, which make two batches
    recipe(*common, *learn, "--compress.fit_on=logits", cwd="run")
    delta = tmp_path / "run/runs/vit_cifar/delta.safetensors"
    whole = delta.read_bytes()
    metadata = dtrain.load(delta).content.metadata
    assert (metadata["method"]["name"], metadata["fit"]["name"]) == (name, "Learn")
    assert metadata["fit"]["loss"] <= metadata["fit"]["start"]
    first = next((tmp_path / "run/runs/vit_cifar/checkpoints").glob("epoch=0*.ckpt"))
    recipe(*common, *learn, "--compress.fit_on=logits", "--ckpt_path", str(first), cwd="run")
    assert delta.read_bytes() == whole


def test_wandb_offline_keeps_the_summary(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    import wandb

    wandb.teardown()  # whatever another test has left open
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    recipe("--trainer.logger=WandbLogger", "--trainer.logger.offline=true", "--compare=false", "--method.masks=1")
    logged, run_id = dict(wandb.run.summary), wandb.run.id
    wandb.finish()
    assert logged["dtrain/bytes"] == (tmp_path / "runs/vit_cifar/delta.safetensors").stat().st_size
    assert {f"dtrain/{name}" for name in ("ratio", "metric_base", "metric_finetuned", "metric_drop")} <= logged.keys()
    assert logged["dtrain/projected_bytes"] == pytest.approx(logged["dtrain/bytes"], abs=300)
    assert logged["dtrain/fit_loss"] <= logged["dtrain/fit_start"]
    (config,) = tmp_path.rglob("config.yaml")  # not in the folder that all runs of the logger share
    assert run_id in config.parent.name
    assert yaml.safe_load(config.read_text())["trainer"]["max_steps"] == 12


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data.dataset", "no/such/folder"), "cannot be loaded"),
        (("--model.pretrained", "no_such_model_anywhere"), "no_such_model_anywhere"),
        (("--data.classes", "[0, 77]"), r"names \[77\]"),
        (("--method.keep", "2"), r"must be in \[2\*\*-24, 1\]"),
        (("--trainer.max_steps=-1", "--trainer.max_epochs=-1"), "follows the length of the run. Give --trainer.max_st"),
        (("--ckpt_path", "none.ckpt"), "--ckpt_path: there is no none.ckpt"),
        (("--compress_only", "none.ckpt"), "--compress_only: there is no none.ckpt"),
        (("--compress_only", str(ROOT / "README.md")), "README.md"),
    ],
)
def test_bad_input_gets_a_sentence(recipe, tmp_path, arguments, sentence):
    with pytest.raises(SystemExit, match=sentence):
        recipe(*arguments)
    assert not list(tmp_path.rglob("delta.safetensors"))


@pytest.mark.parametrize(("text", "says"), [("a: [1", "is no YAML"), ("- 1", "holds a list")])
def test_broken_config_file_gets_a_sentence(recipe, tmp_path, text, says):
    (tmp_path / "broken.yaml").write_text(text)
    with pytest.raises(SystemExit, match=rf"vit_cifar: .*broken\.yaml {says}"):
        recipe("--config", str(tmp_path / "broken.yaml"))


def test_unknown_preset_of_a_config_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from parts.presets import choose_preset

    (tmp_path / "x.yaml").write_text("preset: bogus")
    with pytest.raises(dtrain.InputError, match=r"no preset 'bogus'\. Give auto, hub or offline"):
        choose_preset(["--config", str(tmp_path / "x.yaml")], {})


@pytest.mark.parametrize("text", ["data: {tokenizer: mine}", "data.tokenizer: mine"])
def test_what_a_config_file_has_need_not_be_there_for_the_hub(tmp_path, monkeypatch, text):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    from parts import presets

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(presets, "hub_answers", lambda: True)
    (tmp_path / "x.yaml").write_text(text)
    hub = {"data.tokenizer": "./no_such.spm"}
    assert presets.choose_preset(["--config", str(tmp_path / "x.yaml")], hub)[0] == "hub"
    assert presets.choose_preset(["--data.tokenizer=mine"], hub)[0] == "hub"
    assert presets.choose_preset([], hub)[1].startswith("there is no ./no_such.spm; ask for the real thing")


def test_a_broken_checkpoint_gets_a_sentence(recipe, tmp_path):
    (tmp_path / "broken.ckpt").write_bytes(b"PK and no more")
    with pytest.raises(SystemExit, match=r"--ckpt_path: .*broken\.ckpt is no checkpoint"):
        recipe("--ckpt_path", str(tmp_path / "broken.ckpt"))


def test_a_finished_run_may_go_on_for_longer(recipe, tmp_path):
    common = ("--compare=false", "--trainer.logger=false")
    recipe(*common)
    last = tmp_path / "runs/vit_cifar/checkpoints/last.ckpt"
    recipe(*common, "--trainer.max_steps=16", "--ckpt_path", str(last))
    found = torch.load(last, weights_only=True)
    assert (found["global_step"], found["lr_schedulers"][0]["total_steps"]) == (16, 16)


def test_the_config_that_is_kept_is_one_file_and_the_run_s_own(recipe, tmp_path):
    for part, value in (("data", "batch_size: 24"), ("trainer", "max_steps: 8")):
        (tmp_path / part).mkdir()
        (tmp_path / part / "x.yaml").write_text(f"{value}  # mine\n")
    common = ("--data", "data/x.yaml", "--trainer", "trainer/x.yaml", "--trainer.logger=false", "--compare=false")
    recipe(*common, "--trainer.val_check_interval=00:00:10:00", "--trainer.max_steps=8", "--data.batch_size=24")
    folder = tmp_path / "runs/vit_cifar"
    kept = (folder / "config.yaml").read_text()
    assert (yaml.safe_load(kept)["data"]["batch_size"], yaml.safe_load(kept)["trainer"]["max_steps"]) == (24, 8)
    assert (tmp_path / "data/x.yaml").read_text() == "batch_size: 24  # mine\n"
    assert not list(folder.rglob("x.yaml"))
    recipe("--trainer.logger=false", "--compress_only", str(folder / "checkpoints/last.ckpt"), "--method=Dare")
    assert (folder / "config.yaml").read_text() == kept
    assert yaml.safe_load((folder / "compress_only.yaml").read_text())["method"]["class_path"] == "dtrain.Dare"


def test_unknown_method_is_refused_by_the_parser(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--method", "NoSuchMethod")
    assert "NoSuchMethod" in capsys.readouterr().err


def test_printed_config_is_complete(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--config", str(ROOT / "recipes" / "vit_cifar.yaml"), "--print_config")
    printed = capsys.readouterr().out
    for key in ("method:", "adamr:", "compress:", "pretrained:", "strength: 0.001"):
        assert key in printed


def test_base_is_loaded_with_a_fresh_head(folders):
    model = load_vit(str(folders / "model"), 5)
    saved = load_file(folders / "model" / "model.safetensors")
    assert model.head.weight.shape == (5, 24)
    assert torch.equal(model.state_dict()["blocks.0.attn.qkv.weight"], saved["blocks.0.attn.qkv.weight"])


def test_a_base_that_could_not_be_written_is_not_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(dtrain.InputError, match="No space left"):
        pretrain_on_digits("base", {"model_args": {**MODEL, "num_classes": 5}}, steps=1)
    assert not list(tmp_path.rglob("*.*"))


def test_there_are_two_batches_to_fit_on_however_few_images_are_held_out():
    sizes = [[len(labels) for _, labels in Images(calibration=rows).calibration_dataloader()] for rows in (200, 64, 3)]
    assert sizes == [[64, 64, 64, 8], [32, 32], [2, 1]]


def test_another_method_takes_no_argument_of_the_preset_s(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--config", str(ROOT / "recipes" / "vit_cifar.yaml"), "--method", "SeededSign", "--print_config")
    printed = capsys.readouterr().out
    assert re.search(r"class_path: dtrain.SeededSign\s+init_args:\s+keep: 0.03125\s+seed: 0\s+q: keep", printed)
