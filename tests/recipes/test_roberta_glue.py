"""The RoBERTa recipe as a user runs it, from folders laid out like the Hub's."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

import dtrain
from dtrain import cli
from parts import masked
from parts.encoders import load_encoder
from parts.glue import TASKS
from tests.recipes.small_t5 import WORDS, sentences

# Lightning, its loggers and transformers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def save_roberta(folder: Path, kind: type, **options) -> None:
    """Write a random RoBERTa with its tokenizer in the layout of the Hub."""
    torch.manual_seed(0)
    tokenizer = masked.train_tokenizer(sentences(300, 0))
    tokenizer.save_pretrained(folder)
    kind(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, **SIZES, **options)).save_pretrained(
        folder
    )


def save_bert(folder: Path) -> None:
    """Write a random BERT, saved without a head and so without the prefix that its names have under one."""
    torch.manual_seed(0)
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)).save_pretrained(folder)


def rows_of(task: str, count: int) -> dict[str, object]:
    """Return columns in the schema of `nyu-mll/glue`: pairs, classes or numbers."""
    texts, labels = sentences(count, count), TASKS[task].labels
    columns = {name: texts[:: 1 - 2 * index] for index, name in enumerate(TASKS[task].columns)}
    numbers = [5 * text.count(" ") / 8 for text in texts]
    label = [int(number) % len(labels) for number in numbers] if labels else pa.array(numbers, pa.float32())
    return {**columns, "label": label, "idx": list(range(count))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and tasks in the layouts of the Hub."""
    root = tmp_path_factory.mktemp("local")
    save_roberta(root / "roberta", RobertaForMaskedLM)
    save_roberta(root / "tuned", RobertaForSequenceClassification, num_labels=3)
    save_bert(root / "bert")
    for task in ("sst2", "stsb", "mnli"):
        (root / "glue" / task).mkdir(parents=True)
        for split, count in (("train", 160), *((name, 60 + len(name)) for name in TASKS[task].validation)):
            pq.write_table(pa.table(rows_of(task, count)), root / "glue" / task / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the recipe's command line in this process, in a folder of its own, and return what it prints."""

    def run(*arguments: str, data: str = "glue/sst2", model: str = "roberta", cwd: str = ".") -> str:
        local = ["--data.dataset", str(folders / data), "--model.pretrained", str(folders / model)]
        short = ["--trainer.max_steps=8", "--data.batch_size=16", "--data.calibration=32", "--trainer.accelerator=cpu"]
        rest = ["--model.lr=3e-3", "--model.max_length=32", "--method=SeededSign", "--method.keep=0.2", "--fit=null"]
        (tmp_path / cwd).mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / cwd)
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "argv", ["roberta_glue.py", "--preset=offline", *local, *short, *rest, *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "recipes" / "roberta_glue.py"), run_name="__main__")
        printed = capsys.readouterr()
        assert printed.err.startswith("preset: offline (as asked)")
        return printed.out

    return run


def score(output: str, name: str = "val_score") -> float:
    return float(re.search(rf"{name}\s*│\s*(-?[\d.]+)", output)[1])


def compressed_score(output: str) -> float:
    return float(re.search(r"val_score[^\n]*│\s*(-?[\d.]+)\s*│[^│\n]*│\s*$", output, re.MULTILINE)[1])


def merge(base: Path, delta: Path, out: Path) -> None:
    assert cli.main(["apply", str(base), str(delta), str(out)]) == 0


def test_the_file_gives_the_same_score_in_a_new_process(recipe, tmp_path):
    printed = recipe()
    delta = tmp_path / "runs/roberta_glue/delta.safetensors"
    assert (tmp_path / "runs/roberta_glue/score_against_bytes.png").stat().st_size > 10_000
    assert f"{delta.stat().st_size:,}" in printed
    assert "linear probe" in printed
    (base,) = (tmp_path / "runs/roberta_glue/checkpoints").glob("dtrain-base-*.safetensors")
    apply = [sys.executable, "-m", "dtrain", "apply", str(base), str(delta), str(tmp_path / "merged.safetensors")]
    subprocess.run(apply, check=True, capture_output=True, cwd=ROOT)
    assert score(recipe("--evaluate", "merged.safetensors")) == pytest.approx(compressed_score(printed), abs=5e-5)


def test_a_folder_of_the_hub_is_a_base(recipe, folders, tmp_path):
    printed = recipe("--compress.base", str(folders / "roberta"), "--compare=false")
    delta = tmp_path / "runs/roberta_glue/delta.safetensors"
    merge(folders / "roberta", delta, tmp_path / "merged.safetensors")
    assert score(recipe("--evaluate", "merged.safetensors")) == pytest.approx(compressed_score(printed), abs=5e-5)
    model = AutoModelForSequenceClassification.from_pretrained(folders / "roberta", num_labels=2)
    dtrain.load(delta).apply_(model)
    merged = load_file(tmp_path / "merged.safetensors")
    assert model.state_dict().keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("task", "logged"),
    [
        ("stsb", ("val_pearson", "val_spearman")),
        ("mnli", ("val_matched_accuracy", "val_mismatched_accuracy")),
    ],
)
def test_official_metrics_are_logged(recipe, tmp_path, task, logged):
    printed = recipe(f"--compare={task == 'stsb'}", data=f"glue/{task}")  # its linear probe is another one
    assert logged[0].split("_")[-1] in printed
    (base,) = (tmp_path / "runs/roberta_glue/checkpoints").glob("dtrain-base-*.safetensors")
    merge(base, tmp_path / "runs/roberta_glue/delta.safetensors", tmp_path / "merged.safetensors")
    evaluated = recipe("--evaluate", "merged.safetensors", data=f"glue/{task}")
    scores = [score(evaluated, name) for name in logged]
    assert scores[0] == score(evaluated)
    assert scores[0] != scores[1]


def test_bert_without_a_prefix_is_a_base_too(recipe, tmp_path):
    printed = recipe("--data.task=mnli", "--compare=false", data="glue", model="bert")
    (base,) = (tmp_path / "runs/roberta_glue/checkpoints").glob("dtrain-base-*.safetensors")
    merge(base, tmp_path / "runs/roberta_glue/delta.safetensors", tmp_path / "merged.safetensors")
    arguments = ("--evaluate", "merged.safetensors", "--data.task=mnli")
    assert score(recipe(*arguments, data="glue", model="bert")) == pytest.approx(compressed_score(printed), abs=5e-5)


def table(printed: str) -> str:
    """Return the printed tables without what names a folder."""
    return "\n".join(line for line in printed.splitlines() if "│" in line)


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(recipe, tmp_path):
    common = ("--trainer.max_steps=20", "--checkpoint.save_top_k=-1", "--compare=false")
    whole = recipe(*common, cwd="unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    runs = [tmp_path / name / "runs/roberta_glue" for name in ("unbroken", "broken")]
    for later in ("delta.safetensors", "checkpoints/last.ckpt"):
        (runs[1] / later).unlink()
    first = next((runs[1] / "checkpoints").glob("epoch=0*.ckpt"))
    resumed = recipe(*common, "--ckpt_path", str(first), cwd="broken")
    assert table(resumed) == table(whole)
    assert (runs[0] / "delta.safetensors").read_bytes() == (runs[1] / "delta.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "where", "sentence"),
    [
        ((), {"data": "glue/no_such_folder"}, "there is no task 'no_such_folder'"),
        (("--data.task=sst3",), {}, "there is no task 'sst3'; there are cola, sst2"),
        (("--data.task=cola", "--data.dataset=no/such/folder"), {}, "cannot be loaded"),
        (("--data.task=rte",), {}, r"the columns are \['sentence', 'label', 'idx'\], without \['sentence1'"),
        (("--data.task=rte",), {"data": "glue/stsb"}, "the labels of 'rte' are 0 .entailment."),
        (("--data.task=mnli",), {}, r"has the splits \['train', 'validation'\], not \['validation_matched'"),
        (("--data.dataset=english", "--data.task=sst2"), {}, "has the tasks word_order, next_sentence"),
        ((), {"model": "no_such_model"}, "neither as a local folder nor from the Hub"),
        ((), {"model": "tuned"}, "has a head of 3 outputs"),
        (("--model.max_length=65",), {}, "reads 3 to 64 tokens"),
    ],
)
def test_bad_input_gets_a_sentence(recipe, tmp_path, arguments, where, sentence):
    with pytest.raises(SystemExit, match=sentence):
        recipe(*arguments, **where)
    assert not list(tmp_path.rglob("delta.safetensors"))


def test_the_hub_preset_without_a_network_says_what_to_do(monkeypatch, tmp_path, capsys):
    for place in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)  # what the variable of that name sets at import
    monkeypatch.chdir(tmp_path)
    command = ["roberta_glue.py", "--preset=hub", "--trainer.accelerator=cpu", "--trainer.precision=32"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="data set 'nyu-mll/glue' at revision 'bcdcba79") as stopped:
        runpy.run_path(str(ROOT / "recipes" / "roberta_glue.py"), run_name="__main__")
    said = str(stopped.value)
    assert "--data.dataset" in said
    assert "--preset offline" in said


def test_a_tokenizer_of_another_model_is_refused(recipe, folders, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folders / "roberta", mixed)
    config = json.loads((mixed / "config.json").read_text())
    RobertaForMaskedLM(RobertaConfig(**{**config, "vocab_size": 50})).save_pretrained(mixed)
    with pytest.raises(SystemExit, match=r"knows \d+ tokens, but the model has 50"):
        recipe("--model.pretrained", str(mixed))


def test_weights_by_other_names_are_refused_and_not_drawn_at_random(folders, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(folders / "roberta", renamed)
    weights = load_file(renamed / "model.safetensors")
    save_file({f"model.{name}": value for name, value in weights.items()}, renamed / "model.safetensors")
    sentence = r"lacks \d+ tensors.*, such as roberta\.embeddings\..* It has model\.lm_head\..* instead"
    with pytest.raises(dtrain.InputError, match=sentence):
        load_encoder(str(renamed), TASKS["sst2"])


@pytest.mark.parametrize(
    ("task", "labels", "fits"),
    [
        ("sst2", ("NEGATIVE", "POSITIVE"), True),
        ("sst2", ("positive", "negative"), False),
        ("cola", ("negative", "positive"), False),
        ("rte", ("Entailment", "Not-entailment"), True),
        ("sst2", ("LABEL_0", "LABEL_1"), True),
        ("stsb", ("similarity",), True),
        ("stsb", ("negative", "positive"), False),
    ],
)
def test_a_head_has_the_labels_of_the_task_in_their_order(folders, tmp_path, task, labels, fits):
    save_roberta(tmp_path / "headed", RobertaForSequenceClassification, id2label=dict(enumerate(labels)))
    if fits:
        model, _ = load_encoder(str(tmp_path / "headed"), TASKS[task])
        written = load_file(tmp_path / "headed" / "model.safetensors")
        assert torch.equal(model.classifier.out_proj.weight, written["classifier.out_proj.weight"])
    else:
        with pytest.raises(dtrain.InputError, match=rf"has a head of {len(labels)} outputs, \['{labels[0]}'"):
            load_encoder(str(tmp_path / "headed"), TASKS[task])


def test_a_run_within_its_first_epoch_has_a_score_to_go_by(recipe, tmp_path):
    recipe("--trainer.max_steps=3", "--compare=false")
    checkpoints = {path.name for path in (tmp_path / "runs/roberta_glue/checkpoints").glob("*.ckpt")}
    assert checkpoints == {"epoch=0-step=3.ckpt", "last.ckpt"}


def test_the_yaml_is_the_recipe(recipe, capsys):
    config = ROOT / "recipes" / "roberta_glue.yaml"
    with pytest.raises(SystemExit):
        recipe("--config", str(config), "--print_config")
    printed = yaml.safe_load(capsys.readouterr().out)
    written = yaml.safe_load(config.read_text())
    assert printed["compress"].items() >= written["compress"].items()
    assert not {"method", "fit"} & written.keys()  # they are the preset's
    assert printed["model"].keys() >= {"pretrained", "revision", "lr", "max_length"}
    assert printed["data"]["revision"] == "main"
