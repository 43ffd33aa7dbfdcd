"""The NLVR2 recipe as a user runs it: official files and Parquet, offline digits, resumed, evaluated, refused."""

import errno
import io
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pil
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceTrainer

import dtrain
from dtrain.cli import main
from parts import beit3_base, presets
from parts.beit3 import SMALL, Beit3, Beit3Config, Beit3ForPairs
from parts.digit_pairs import WordTokenizer

# Lightning and its loggers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SAID = [f"the {side} image is {how} than the other" for side in ("left", "right") for how in ("darker", "brighter")]
SIZES = Beit3Config(width=64, depth=2, heads=1, image_size=8, patch_size=4, vocabulary=32, positions=66)


def write_pairs(folder: Path) -> None:
    """Grey images of odd sizes with true and false statements, in NLVR2's schema."""
    generator = np.random.default_rng(0)
    features = {"left_image": Image(), "right_image": Image(), "sentence": Value("string")}
    for split, count in (("train", 160), ("validation", 48)):
        light = generator.integers(30, 220, (count, 2))
        claims = generator.integers(4, size=count)
        said_darker = claims // 2 == claims % 2  # "the left is darker" and "the right is brighter": the left is darker
        labels = (said_darker == (light[:, 0] < light[:, 1])).astype(int).tolist()
        pictures = [[Pil.new("L", (9, 12), int(value)) for value in side] for side in light.T]
        rows = {"left_image": pictures[0], "right_image": pictures[1], "sentence": [SAID[claim] for claim in claims]}
        label = ClassLabel(names=["False", "True"])
        data = Dataset.from_dict(rows | {"label": labels}, features=Features(features | {"label": label}))
        data.to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, a tokenizer and a data set in the layouts of the official ones."""
    root = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    state = {f"beit3.{name}": value for name, value in Beit3(SIZES).state_dict().items()}
    torch.save({"model": state}, root / "base.pth")
    torch.save({"model": state | {"mlm_head.bias": torch.zeros(32)}}, root / "with_head.pth")
    spm = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=iter(SAID * 9), model_writer=spm, vocab_size=25, minloglevel=2)
    (root / "beit3.spm").write_bytes(spm.getvalue())
    (root / "data").mkdir()
    write_pairs(root / "data")
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the recipe's command line in this process, in a folder of its own, and return what it prints."""

    def run(*arguments: str, preset: str = "hub", cwd: str = ".") -> str:
        local = ["--data.dataset", str(folders / "data"), "--model.pretrained", str(folders / "base.pth")]
        local += ["--data.tokenizer", str(folders / "beit3.spm"), "--data.image_size=8", "--data.workers=0"]
        short = ["--trainer.max_steps=6", "--data.batch_size=16", "--data.calibration=16", "--trainer.accelerator=cpu"]
        short += ["--trainer.precision=32-true", "--method.masks=1"]
        (tmp_path / cwd).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("COLUMNS", "120")
        given = [*(local if preset == "hub" else []), *short, *arguments]
        monkeypatch.setattr(sys, "argv", ["beit3_nlvr2.py", f"--preset={preset}", *given])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "recipes" / "beit3_nlvr2.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.startswith(f"preset: {preset} (as asked)")
        return printed.out

    return run


def score(output: str) -> float:
    return float(re.search(r"val_acc\s*│\s*([\d.]+)", output)[1])


def test_the_file_gives_the_same_accuracy_once_it_is_applied(recipe, folders, tmp_path):
    printed = recipe("--method.q=keep")
    compressed = float(re.search(r"val_acc[^\n]*│\s*([\d.]+)\s*│[^│\n]*│\s*$", printed, re.MULTILINE)[1])
    delta = tmp_path / "runs/beit3_nlvr2/delta.safetensors"
    assert (tmp_path / "runs/beit3_nlvr2/score_against_bytes.png").stat().st_size > 10_000
    assert f"{delta.stat().st_size:,}" in printed
    assert "control, fine-tuned: " in printed
    assert main(["apply", str(folders / "base.pth"), str(delta), "merged.safetensors"]) == 0
    assert load_file("merged.safetensors").keys() == Beit3ForPairs(SIZES).state_dict().keys()  # those of the original
    assert score(recipe("--evaluate", "merged.safetensors")) == pytest.approx(compressed, abs=5e-5)


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(recipe, tmp_path):
    common = ("--trainer.max_steps=18", "--checkpoint.save_top_k=-1", "--compare=false")  # two epochs
    recipe(*common, cwd="unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    runs = [tmp_path / name / "runs/beit3_nlvr2" for name in ("unbroken", "broken")]
    for later in ("delta.safetensors", "checkpoints/last.ckpt"):
        (runs[1] / later).unlink()
    first = next((runs[1] / "checkpoints").glob("epoch=0*.ckpt"))
    recipe(*common, "--ckpt_path", str(first), cwd="broken")
    assert (runs[0] / "delta.safetensors").read_bytes() == (runs[1] / "delta.safetensors").read_bytes()
    whole, resumed = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in runs)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_scales_are_learnt_through_both_modalities(recipe, tmp_path):
    recipe("--fit=Learn", "--fit.steps=2", "--data.calibration=16")  # as many as a batch of training pairs has
    assert dtrain.load(tmp_path / "runs/beit3_nlvr2/delta.safetensors").report().ratio > 1


def test_without_the_official_files_the_preset_is_offline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(presets.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(presets, "hub_answers", lambda: True)
    hub = runpy.run_path(str(ROOT / "recipes" / "beit3_nlvr2.py"))["PRESETS"]["hub"]
    preset, why = presets.choose_preset((), hub)
    assert (preset, why) == ("offline", "there is no ./nlvr2; ask for the real thing with --preset hub")
    # What is named is the user's: a name of the Hub, or a file that the recipe says is missing.
    named = ("--data.tokenizer=a/beit3.spm", "--model.pretrained", "a/base.pth", "--data.dataset=a/b")
    assert presets.choose_preset(named, hub)[0] == "hub"
    assert presets.choose_preset(named[:1], hub)[0] == "offline"
    for file in ("beit3.spm", "beit3_base_patch16_224.pth"):
        Path(file).touch()
    assert presets.choose_preset((), hub)[0] == "offline"
    Path("nlvr2").mkdir()
    assert presets.choose_preset((), hub)[0] == "hub"
    assert presets.choose_preset(("--preset", "offline"), hub) == ("offline", "as asked")


def test_the_probe_looks_at_what_the_head_gets():
    torch.manual_seed(0)
    probe = runpy.run_path(str(ROOT / "recipes" / "beit3_nlvr2.py"))["probe"]
    model, padding = Beit3ForPairs(SIZES).eval(), torch.zeros(40, 3, dtype=torch.bool)
    batches = []
    for _ in range(2):
        labels = torch.arange(40) % 2
        left = 0.1 * torch.randn(40, 3, 8, 8) + labels[:, None, None, None]
        batches.append([(left, torch.randn(40, 3, 8, 8), torch.tensor([[0, 5, 2]]).expand(40, 3), padding, labels)])
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)  # behind it there is nothing to see
    assert probe(model, *batches) > 0.9
    assert model.class_tokens(*batches[0][0][:-1]).shape == (40, 4 * SIZES.width)


def test_a_base_that_could_not_be_written_is_not_taken_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(beit3_base, "STEPS", 3)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(dtrain.InputError, match="No space left"):
        beit3_base.load_beit3("digits", 8, 2)
    assert not list(tmp_path.rglob("*.*"))


def test_offline_the_base_is_pretrained_and_cached(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(beit3_base, "STEPS", 3)
    small = ("--data.pairs=256", "--data.calibration=32", "--fit.steps=4", "--compare=false", "--trainer.max_steps=3")
    recipe(*small, preset="offline")
    base = tmp_path / beit3_base.CACHE / "model.safetensors"
    written = base.stat().st_mtime_ns
    assert load_file(base).keys() == {f"beit3.{name}" for name in Beit3(SMALL).state_dict()}
    first = Path("runs/beit3_nlvr2/delta.safetensors").read_bytes()
    recipe(*small, preset="offline")
    assert base.stat().st_mtime_ns == written
    assert Path("runs/beit3_nlvr2/delta.safetensors").read_bytes() == first  # whether it was cached changes nothing


def test_captions_are_true_of_some_digits_and_false_of_others():
    said = beit3_base.captions()
    true = {text: {digit for digit, holds in enumerate(found) if holds} for text, found in said.items()}
    assert true["the image shows the digit seven"] == {7}
    assert true["the digit is odd"] == {1, 3, 5, 7, 9}
    assert true["the digit three is larger"] == {0, 1, 2}
    assert true["the digit three is smaller"] == {4, 5, 6, 7, 8, 9}
    assert len(true) == 30
    assert all(0 < len(digits) < 10 for digits in true.values())
    assert not any(3 in WordTokenizer()(text) for text in said)  # no word is unknown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.pretrained=none.pth"], r"no checkpoint at none\.pth.*--preset offline"),
        (["--data.tokenizer=words"], "the tokenizer has .* ids, the text embedding 32 rows"),
        (["--data.tokenizer=none.spm"], r"no tokenizer at none\.spm"),
        (["--data.image_size=9"], "patches of 4 pixels"),
        (["--evaluate", "base.pth"], "the model has head.dense1.bias of .*, the file has no such tensor"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_gets_a_sentence(recipe, folders, tmp_path, arguments, message):
    shutil.copy(folders / "base.pth", tmp_path / "base.pth")
    with pytest.raises(SystemExit) as stopped:
        recipe(*arguments)
    assert re.search(f"^beit3_nlvr2: .*{message}", str(stopped.value))


@pytest.mark.parametrize("preset", ["hub", "offline"])
def test_the_yaml_is_read_and_the_configuration_printed(recipe, capsys, preset):
    with pytest.raises(SystemExit) as stopped:
        recipe("--config", str(ROOT / "recipes/beit3_nlvr2.yaml"), "--print_config", preset=preset)
    assert stopped.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["preset"] == preset
    assert config["compress"]["module"] == "model"
    assert config["method"]["class_path"] == "dtrain.SeededSign"
    assert (config["fit"] or {}).get("class_path") == {"hub": None, "offline": "dtrain.Learn"}[preset]
    assert "image_size" not in config["model"]  # follows the data


def test_a_run_is_compressed_against_another_layout_of_its_base(recipe, folders, tmp_path):
    base = str(folders / "with_head.pth")  # and of smaller images
    recipe("--data.image_size=12", "--compare=false", "--trainer.max_steps=3", "--model.pretrained", base)
    run = tmp_path / "runs/beit3_nlvr2"
    last, own = str(run / "checkpoints/last.ckpt"), str(run / "delta.safetensors")
    assert main(["apply", base, own, "merged.safetensors"]) == 1  # its base has what the model has, and no more
    assert main(["compress", base, last, "delta.safetensors", "--method", "SeededSign"]) == 0
    state = dtrain.load("delta.safetensors").state_dict(dtrain.read_weights(base))
    save_file(state, "merged.safetensors")
    assert state["beit3.encoder.embed_positions.A.weight"].shape == (12, 64)
    assert score(recipe("--data.image_size=12", "--evaluate=merged.safetensors")) > 0
    recipe("--data.image_size=12", "--compare=false", "--compress_only", last, "--compress.base", base)
    assert main(["apply", base, own, "merged.safetensors"]) == 0
