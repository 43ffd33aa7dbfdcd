"""The T5 recipe as a user runs it from local folders."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import dtrain
from dtrain import cli
from parts import t5
from parts.glue import find_task
from tests.recipes.small_t5 import OLD_BIAS, save_t5, sentences

# Lightning, its loggers and transformers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two tasks in the layouts of the Hub."""
    root = tmp_path_factory.mktemp("local")
    for kind in ("tied", "untied"):
        save_t5(root / kind, tied=kind == "tied")
    for split, count in (("train", 160), ("validation", 60)):
        texts = sentences(count, count)
        numbers = [5 * text.count(" ") / 8 for text in texts]
        pair = {"sentence1": texts, "sentence2": texts[::-1], "label": pa.array(numbers, pa.float32())}
        single = {"sentence": texts, "label": [int("good" in text) for text in texts]}
        for task, columns in (("sst2", single), ("stsb", pair)):
            (root / "glue" / task).mkdir(parents=True, exist_ok=True)
            table = pa.table({**columns, "idx": list(range(count))})
            pq.write_table(table, root / "glue" / task / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the recipe's command line in this process, in a folder of its own, and return what it prints."""

    def run(*arguments: str, cwd: str = ".") -> str:
        local = ["--data.dataset", str(folders / "glue"), "--model.pretrained", str(folders / "tied")]
        short = ["--trainer.max_steps=8", "--data.batch_size=16", "--data.calibration=32", "--trainer.accelerator=cpu"]
        task = ["--data.task=sst2", "--model.lr=3e-3", "--method=SeededSign", "--method.keep=0.2"]
        (tmp_path / cwd).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["t5_glue.py", "--preset=offline", *local, *short, *task, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "recipes" / "t5_glue.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.startswith("preset: offline (as asked)")
        run.said = printed.err
        return printed.out

    return run


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_file_gives_the_same_score(recipe, folders, tmp_path, kind):
    base = str(folders / kind)
    printed = recipe("--model.pretrained", base, f"--compare={str(kind == 'tied').lower()}")
    lines = re.search(r"fine-tuned [\d.]+, linear probe [\d.]+, base [\d.]+", " ".join(printed.split()))
    assert (lines is not None) == (kind == "tied")
    delta = dtrain.load(tmp_path / "runs/t5_glue/delta.safetensors")
    roles = {record.name: record.role.name for record in delta.content.records}
    # A tied embedding is there once, by the name that it has in the base's file, and compressed like any matrix.
    held = {name for name in roles if re.search(r"shared|embed_tokens|lm_head", name)}
    assert held == {"shared.weight"} if kind == "tied" else {"shared.weight", "lm_head.weight"}
    assert all(roles[name] == "ADD" for name in roles if name in held or "SelfAttention.relative" in name)
    assert roles.get(OLD_BIAS) == ("BASE_ONLY" if kind == "tied" else None)
    merged = str(tmp_path / "merged.safetensors")
    assert cli.main(["apply", base, str(delta.origin), merged]) == 0
    again = recipe("--model.pretrained", base, "--evaluate", merged)
    for metric in ("val_score", "val_rank_accuracy", "val_generate_accuracy"):
        compressed = re.search(rf"{metric}\s*│[^│\n]*│[^│\n]*│\s*([\d.]+)", printed)[1]
        score = re.search(rf"{metric}\s*│\s*([\d.]+)", again)[1]
        assert float(score) == pytest.approx(float(compressed), abs=5e-5)
    model = t5.load_t5(Path(base))[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta.apply_(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in load_file(merged).items())
    assert (model.lm_head.weight is model.shared.weight) == (kind == "tied")
    delta.remove_(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(recipe, tmp_path):
    common = ("--trainer.max_steps=20", "--checkpoint.save_top_k=-1", "--compare=false")
    fitted = ("--fit=Search", "--fit.scan=golden")
    whole = recipe(*common, *fitted, cwd="unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    runs = [tmp_path / name / "runs/t5_glue" for name in ("unbroken", "broken")]
    for later in ("delta.safetensors", "checkpoints/last.ckpt"):
        (runs[1] / later).unlink()
    first = next((runs[1] / "checkpoints").glob("epoch=0*.ckpt"))
    resumed = recipe(*common, *fitted, "--ckpt_path", str(first), cwd="broken")
    assert (runs[0] / "delta.safetensors").read_bytes() == (runs[1] / "delta.safetensors").read_bytes()
    tables = [text[text.index("SeededSign(") :].replace(str(runs), "") for text in (whole, resumed)]
    rows = [[line for line in text.splitlines() if "│" in line] for text in tables]
    assert rows[0] == rows[1]
    assert rows[0]


def test_scales_are_learnt_from_the_text_of_every_label(recipe, tmp_path):
    recipe(
        "--fit=Learn",
        "--fit.steps=4",
        "--compare=false",
        "--compress.fit_on=logits",
        "--compress.calibration_batches=2",
    )
    metadata = dtrain.load(tmp_path / "runs/t5_glue/delta.safetensors").content.metadata
    assert metadata["fit"]["name"] == "Learn"
    assert metadata["fit"]["loss"] <= metadata["fit"]["start"]


def test_numbers_are_learnt_as_text(recipe):
    fit = ("--compress.fit_on=metric", "--fit=Search", "--fit.scan=golden", "--compare=false")
    printed = recipe("--data.task=stsb", "--model.scoring=generate", *fit)
    assert recipe.said.count("scales are fitted to ranked labels") == 1
    for metric in ("val_rank_pearson", "val_rank_spearman", "val_generate_pearson", "val_generate_spearman"):
        assert metric in printed


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data.dataset", "no/such/folder"), "no/such/folder"),
        (("--model.pretrained", "nobody/no_such_model"), r"no local folder.*--preset offline"),
        (("--data.task", "sst3"), "there is no task 'sst3'; there are cola"),
        (("--data.batch_size", "400"), "training rows are left"),
        (("--method.keep", "2"), r"must be in"),
    ],
)
def test_bad_input_gets_a_sentence(recipe, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit, match=sentence):
        recipe(*arguments)
    assert not list(tmp_path.rglob("delta.safetensors"))


def test_printed_config_is_complete(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--config", str(ROOT / "recipes" / "t5_glue.yaml"), "--print_config")
    printed = capsys.readouterr().out
    for key in ("method:", "adamr:", "compress:", "pretrained:", "scoring: rank", "strength: 0.001"):
        assert key in printed


@pytest.mark.parametrize(
    ("arguments", "task"),
    [((), "sst2"), (("--data.task=mnli",), "mnli"), (("--data.dataset=some/cola",), "cola")],
)
def test_the_task_is_asked_for_or_the_folders_beside_a_preset_too(monkeypatch, capsys, arguments, task):
    monkeypatch.setattr(sys, "argv", ["t5_glue.py", "--preset=hub", *arguments, "--print_config"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "recipes" / "t5_glue.py"), run_name="__main__")
    data = yaml.safe_load(capsys.readouterr().out)["data"]
    assert find_task(data["dataset"], data["task"]).name == task


def test_rows_to_fit_on_come_in_two_batches_whose_labels_are_only_ranked(folders):
    data = runpy.run_path(str(ROOT / "recipes" / "t5_glue.py"))["Prompts"](
        str(folders / "glue"), "sst2", calibration=20
    )
    assert [(len(labels), only_ranked) for _, labels, only_ranked in data.calibration_dataloader()] == [(10, True)] * 2
