"""`compress --calibration`: a Hugging Face folder is run on texts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import torch
import transformers
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import dtrain
from dtrain.cli.huggingface import load_text_model
from dtrain.cli.renamed import Renamed
from dtrain.cli.texts import read_texts
from tests.cli.models import SIZES, decoder, encoder, fine_tune, save, sentences, tokenizer
from tests.cli.tools import check_refusal

COMPRESS = ["compress", "base", "tuned", "d.safetensors"]


@pytest.fixture
def texts():
    """The name of a file of 40 texts."""
    Path("train.txt").write_text("\n\n".join(sentences(40)))
    return "train.txt"


def names(module):
    return {name for name, _ in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("layout", ["txt", "jsonl", "parquet"])
def test_all_kinds_of_files_hold_the_same_texts(layout):
    rows = sentences(50)
    Path("t.txt").write_text("\n \n".join(rows))
    Path("t.jsonl").write_text("".join(json.dumps({"text": row, "label": 0}) + "\n" for row in rows))
    parquet.write_table(pyarrow.table({"idx": list(range(50)), "text": rows}), "t.parquet")
    found = read_texts(f"t.{layout}", (), 20)
    assert found.columns == (() if layout == "txt" else ("text",))
    assert found == read_texts(f"t.{layout}", (), 20)
    assert found.found == 50
    assert found.rows == [(row,) for row in [row for (row,) in read_texts("t.txt", (), 50).rows][:20]]


def test_any_stretch_of_the_texts_lies_evenly_over_the_file():
    Path("t.txt").write_text("\n".join(f"text {i}" for i in range(10_000)))
    rows = [int(row.split()[1]) for (row,) in read_texts("t.txt", (), 128).rows]
    assert len(set(rows)) == 128
    for part in (rows, rows[:96], rows[96:]):  # what is learnt from, and what is held out
        assert abs(sum(row < 5_000 for row in part) / len(part) - 0.5) < 0.05


def test_rows_without_text_are_no_texts():
    parquet.write_table(pyarrow.table({"text": ["one", None, "", "two"]}), "t.parquet")
    found = read_texts("t.parquet", (), 128)
    assert sorted(found.rows) == [("one",), ("two",)]
    assert found.found == 2


@pytest.mark.parametrize(
    ("columns", "asked", "found"),
    [
        (("sentence", "label_text"), (), ("sentence",)),
        (("body", "title"), ("title",), ("title",)),
        (("body",), (), ("body",)),
        (("sentence1", "sentence2", "text"), (), ("sentence1", "sentence2")),
        (("question", "sentence"), (), ("question", "sentence")),
        (("b", "a"), ("a", "b"), ("a", "b")),
    ],
)
def test_which_column(columns, asked, found):
    parquet.write_table(pyarrow.table({name: [f"{name} {i}" for i in range(3)] for name in columns}), "t.parquet")
    texts = read_texts("t.parquet", asked, 1)
    assert texts.columns == found
    assert texts.rows == [tuple(f"{name} 0" for name in found)]


def test_an_encoder_is_fitted_under_the_names_of_its_base(run, texts):
    encoder()
    found = run(*COMPRESS, "--method=DareX", "--method.keep", "0.5", "--calibration", texts, "--json")
    assert (found[0], found[2]) == (0, "")
    data = json.loads(found[1])
    assert data["fit"]["objective"] == "hidden change"
    assert data["calibration"] == {
        "file": texts, "column": [], "samples": 40, "rows": 40, "batches": 2, "tokens": data["calibration"]["tokens"]
    }  # fmt: skip
    in_python = load_text_model("base", "tuned", read_texts(texts, (), 128).rows, 32)
    objective = dtrain.HiddenChange(in_python.module, in_python.batches)
    expected = dtrain.compress("base", "tuned", dtrain.DareX(keep=0.5), objective=objective)
    expected.save("expected.safetensors")
    assert Path("d.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert run("verify", "base", "d.safetensors")[0] == 0


@pytest.mark.parametrize(
    ("words", "label"),
    [((), "top-5 logit mse"), (("--objective", "mse"), "logit mse"), (("--objective=kl",), "logit divergence")],
)
def test_a_decoder_pads_with_its_end_and_is_fitted_to_its_logits(run, texts, words, label):
    decoder()
    code, out, err = run(*COMPRESS, "--method=DareX", "--calibration", texts, "--json", *words)
    assert (code, err) == (0, "")
    assert json.loads(out)["fit"]["objective"] == label


@pytest.mark.parametrize("words", [["--method=Wanda"], ["--method=EoRA"], ["--method=DeltaCoMe", "--method.gptq=true"]])
@pytest.mark.parametrize("make", [encoder, decoder])
def test_methods_that_look_at_inputs(run, texts, words, make):
    make()
    code, out, err = run(*COMPRESS, *words, f"--calibration={texts}", "--calibration.samples=8", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["calibration"]["samples"] == 8
    uncalibrated = dtrain.load("d.safetensors").content.metadata["uncalibrated"]
    assert not [name for name in uncalibrated if "embed" not in name and "wt" not in name and "wpe" not in name]


@pytest.mark.parametrize(
    ("words", "fit", "objective"),
    [
        (("Learn", "--fit.per", "row", "--fit.steps=4"), dtrain.Learn(per="row", steps=4), "hidden"),
        (("Search", "--fit.scan", "golden", "--objective", "mse"), dtrain.Search(scan="golden"), "mse"),
        (("ClosedForm", "--fit.rule", "mse"), dtrain.ClosedForm(rule="mse"), None),
        (("ClosedForm", "--fit.rule", "gram"), dtrain.ClosedForm(rule="gram"), None),
    ],
)
def test_fits(run, texts, words, fit, objective):
    encoder()
    data = [] if fit.needs == "nothing" else ["--calibration", texts]
    code, out, err = run(*COMPRESS, "--method=SeededSign", "--method.keep=0.5", "--fit", *words, *data, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)["fit"]
    assert found["name"] == type(fit).__name__
    model = load_text_model("base", "tuned", read_texts(texts, (), 128).rows, 32)
    given = {
        "hidden": {"objective": dtrain.HiddenChange(model.module, model.batches)},
        "mse": {"objective": dtrain.LogitChange(model.module, model.batches)},
        None: {"calibration": dtrain.Calibration(model.module, model.batches)},
    }[objective]
    expected = dtrain.compress("base", "tuned", dtrain.SeededSign(keep=0.5), fit=fit, **given)
    assert found == expected.content.metadata["fit"]
    expected.save("expected.safetensors")
    assert Path("d.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()


@pytest.mark.parametrize("bare", [False, True], ids=["", "base without a head"])
def test_scales_of_a_tied_decoder_are_learnt(run, texts, bare):
    decoder()
    if bare:
        save(transformers.AutoModelForCausalLM.from_pretrained("base").transformer, "base")
    words = ["--method=SeededSign", "--method.keep=0.5", "--fit=Learn", "--fit.steps=10"]
    code, out, err = run(*COMPRESS, *words, "--calibration", texts, "--calibration.batch=10", "--json")
    assert (code, err) == (0, "")
    fit = json.loads(out)["fit"]
    assert fit["objective"] == "top-5 logit mse"
    assert fit["loss"] < fit["start"]
    assert fit["factors"][0] < fit["factors"][1]
    assert run("verify", "base", "d.safetensors")[0] == 0


def test_what_was_fitted_is_printed(run, texts):
    encoder()
    code, out, err = run(*COMPRESS, "--method=SeededSign", "--fit=Learn", "--fit.steps=2", "--calibration", texts)
    assert (code, err) == (0, "")
    assert "looked at 40 of the 40 texts of train.txt, " in out
    assert 'fit: {"name": "Learn", "steps": 2, ' in out


def test_a_base_vector_of_the_family(run, texts):
    encoder()
    shutil.copytree("tuned", "other")
    assert run("share", "base", "tuned", "other", "family.safetensors", "--method", "SeededSign")[0] == 0
    words = ["--method=Dbms", "--method.source=shared", "--shared", "family.safetensors", "--calibration", texts]
    code, out, err = run(*COMPRESS, *words, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["fit"]["lam"]
    assert run("verify", "base", "d.safetensors")[0] == 0
    check_refusal(run(*COMPRESS, *words[:2], *words[4:]), 2, "no base vector", "--shared FILE")


def test_a_renamed_model_computes_what_the_model_does_and_has_every_tensor_once(texts):
    encoder()
    rows = read_texts(texts, (), 4).rows
    found = load_text_model("base", "tuned", rows, 4)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("tuned")
    (batch,) = found.batches
    assert torch.equal(found.module(**batch).logits, model(**batch).logits)
    assert names(found.module) == {name.removeprefix("bert.") for name in names(model)}
    assert not found.module.training


def test_what_stands_in_for_a_tensor_is_computed_with_and_leaves_no_trace(texts):
    encoder()
    found = load_text_model("base", "tuned", read_texts(texts, (), 4).rows, 4)
    (batch,) = found.batches
    before = {name: tensor.clone() for name, tensor in found.module.state_dict().items()}
    plain = found.module(**batch).logits
    for name in ("embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.weight", "classifier.weight"):
        other = torch.randn(before[name].shape, requires_grad=True)
        logits = torch.func.functional_call(found.module, {name: other}, kwargs=batch).logits
        assert not torch.allclose(logits, plain)
        assert torch.autograd.grad(logits.sum(), other)[0].abs().sum() > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.module.state_dict().items())


class Outer(torch.nn.Module):
    """A model whose parts hold tensors of their own, two of them behind a prefix of two parts."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.wrapped = torch.nn.Module()
        self.wrapped.inner = torch.nn.Module()
        self.wrapped.side = torch.nn.Linear(3, 3)
        self.wrapped.inner.token = torch.nn.Parameter(torch.ones(3))
        self.wrapped.inner.register_buffer("passing", torch.ones(3), persistent=False)
        self.wrapped.inner.layer = torch.nn.Linear(3, 3)

    def forward(self, x):
        inner = self.wrapped.inner
        return self.scale * self.wrapped.side(inner.layer(x + inner.token) + inner.passing)


@pytest.mark.parametrize("prefix", ["", "wrapped.", "wrapped.inner."])
def test_tensors_that_no_layer_holds_are_renamed_like_all(prefix):
    model, x = Outer(), torch.randn(2, 3)
    expected, known = model(x), {name.removeprefix(prefix) for name in model.state_dict()}
    renamed = Renamed(model, prefix, {"inert.ids": torch.arange(3)})
    assert renamed.state_dict().keys() == known | {"inert.ids"}
    assert torch.equal(renamed(x), expected)
    for name in names(renamed):
        zeros = torch.zeros(renamed.state_dict()[name].shape)
        assert not torch.equal(torch.func.functional_call(renamed, {name: zeros}, (x,)), expected), name
    assert torch.equal(renamed(x), expected)


def test_a_buffer_that_only_old_checkpoints_have_is_no_hindrance(run, texts):
    encoder()
    for folder, name in (("base", "embeddings.position_ids"), ("tuned", "bert.embeddings.position_ids")):
        state = load_file(f"{folder}/model.safetensors") | {name: torch.arange(24)[None]}
        save_file(state, f"{folder}/model.safetensors", {"format": "pt"})
    assert run(*COMPRESS, "--method=DareX", "--calibration", texts)[::2] == (0, "")


def test_a_model_that_reads_and_writes(run, texts):
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=32, decoder_start_token_id=0, **sizes)
    base = transformers.T5ForConditionalGeneration(config)
    save(base, "base", tokenizer(eos_token="[END]"))
    save(fine_tune(base), "tuned")
    code, out, err = run(*COMPRESS, "--method=DareX", "--calibration", texts, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["fit"]["objective"] == "top-5 logit mse"


def test_pairs_and_long_texts_fit_the_positions_of_the_model():
    config = transformers.RobertaConfig(vocab_size=32, max_position_embeddings=24, **SIZES)
    encoder(config)
    found = load_text_model("base", "tuned", [("the film " * 9, "a plot " * 9), ("good", "bad")], 2)
    (batch,) = found.batches
    assert batch["input_ids"].shape == (2, 22)  # two of 24 positions are RoBERTa's own
    assert batch["attention_mask"].sum(1).tolist() == [22, 5]
    assert found.module(**batch).logits.isfinite().all()


def test_the_tokenizer_of_the_base_will_do(texts):
    encoder()
    for file in Path("tuned").glob("*token*"):
        shutil.move(file, "base")
    assert load_text_model("base", "tuned", read_texts(texts, (), 4).rows, 4).batches


def without_config():
    Path("tuned/config.json").unlink()


def without_tokenizer():
    for file in Path("tuned").glob("*token*"):
        file.unlink()


def change_config(**fields):
    path = Path("tuned/config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def of_another_model():
    config = transformers.BertConfig(vocab_size=8, max_position_embeddings=24, **SIZES)
    save(fine_tune(transformers.BertForSequenceClassification(config)), "tuned")
    save(transformers.BertModel(config), "base")


def of_images():
    config = transformers.ViTConfig(image_size=8, patch_size=4, **SIZES)
    save(fine_tune(transformers.ViTForImageClassification(config)), "tuned")


REFUSALS = {
    "no such file": (lambda: None, ["no.txt"], 1, "no.txt cannot be read", "No such file"),
    "no such kind": (lambda: Path("t.csv").touch(), ["t.csv"], 1, "t.csv is no .parquet, .jsonl or .txt"),
    "no texts": (lambda: Path("t.txt").write_text("\n \n"), ["t.txt"], 1, "t.txt holds no text"),
    "no Parquet": (lambda: Path("t.parquet").write_text("x"), ["t.parquet"], 1, "t.parquet cannot be read as parquet"),
    "no JSON": (lambda: Path("t.jsonl").write_text("{"), ["t.jsonl"], 1, "t.jsonl cannot be read as jsonl"),
    "no objects": (lambda: Path("t.jsonl").write_text("[1]"), ["t.jsonl"], 1, "a line is [1], and no object"),
    "no column": (lambda: None, ["two.parquet", "--calibration.column", "c"], 1, "'c'", "text in 'a', 'b'"),
    "two columns": (lambda: None, ["two.parquet"], 1, "text in 'a', 'b'", "--calibration.column NAME"),
    "three columns": (lambda: None, ["two.parquet", "--calibration.column", "a", "b", "c"], 1, "got 'a', 'b', 'c'"),
    "no folder": (without_config, ["t.txt"], 1, "tuned is no Hugging Face folder", "dtrain.Calibration("),
    "no tokenizer": (without_tokenizer, ["t.txt"], 1, "no tokenizer in tuned or base", "save_pretrained('tuned')"),
    "no class": (lambda: change_config(architectures=["Foo"]), ["t.txt"], 1, "tuned is a Foo", "never run"),
    "no model": (lambda: change_config(architectures=["logging"]), ["t.txt"], 1, "tuned is a logging"),
    "no type": (lambda: Path("tuned/config.json").write_text("{}"), ["t.txt"], 1, "names no model_type"),
    "other sizes": (lambda: change_config(hidden_size=8), ["t.txt"], 1, "cannot build BertForSequenceClassification"),
    "other class": (
        lambda: change_config(architectures=["BertForMaskedLM"]),
        ["t.txt"],
        1,
        "tuned lacks 'cls.predictions",
        "random weights",
    ),
    "other tokenizer": (of_another_model, ["t.txt"], 1, "the 8 tokens of the model"),
    "images": (of_images, ["t.txt"], 1, "tuned is no text model", "pixel_values", "dtrain.Calibration("),
    "no device": (lambda: None, ["t.txt", "--calibration.device", "foo"], 1, "put on 'foo'"),
    "samples=0": (lambda: None, ["t.txt", "--calibration.samples", "0"], 2, "--calibration.samples cannot be '0'"),
    "no objective": (lambda: None, ["t.txt", "--objective", "foo"], 2, "--objective cannot be 'foo'"),
    "no need": (lambda: None, ["t.txt", "--method=Ecsq"], 2, "Ecsq looks at no data", "--fit Learn"),
    "no use": (lambda: None, ["t.txt", "--method=Wanda", "--objective=kl"], 2, "Leave out --objective"),
    "no fit": (lambda: None, ["t.txt", "--fit", "Lern"], 2, "no fit 'Lern'", "Did you mean Learn?"),
    "no fit at all": (lambda: None, ["t.txt", "--fit.steps", "3"], 2, "--fit NAME is missing"),
    "no steps": (lambda: None, ["t.txt", "--fit=Learn", "--fit.steps=x"], 2, "--fit.steps cannot be 'x'", "--fit.help"),
    "steps=0": (lambda: None, ["t.txt", "--fit=Learn", "--fit.steps=0"], 2, "`steps` must be at least 1"),
    "one batch": (lambda: None, ["t.txt", "--fit=Learn"], 1, "got one. Give smaller batches or more"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_looked_at_is_refused_in_a_sentence(run, case):
    damage, argv, code, *words = REFUSALS[case]
    encoder()
    Path("t.txt").write_text("\n".join(sentences(4)))
    parquet.write_table(pyarrow.table({"a": ["x"], "b": ["y"]}), "two.parquet")
    damage()
    check_refusal(run(*COMPRESS, "--method=DareX", "--calibration", *argv), code, *words)
    assert not Path("d.safetensors").exists()


@pytest.mark.parametrize("argv", [["--objective", "kl"], ["--calibration.column", "a"]])
def test_how_to_look_wants_something_to_look_at(run, argv):
    check_refusal(run(*COMPRESS, "--method=DareX", *argv), 2, "give --calibration FILE")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--method=DareX"], "--method.q keep"),
        (["--method=Dbms"], "--method.lam"),
        (["--method=SeededSign", "--fit=Learn"], "Learn fits scales to training inputs"),
        (["--method=SeededSign", "--fit=ClosedForm", "--fit.rule=gram"], "--fit.rule norm"),
        (["--method=EoRA"], "--method.weighted false"),
        (["--method=Wanda"], "use Magnitude"),
    ],
)
def test_without_texts_they_are_asked_for(run, words, said):
    check_refusal(run(*COMPRESS, *words), 2, "--calibration FILE", said, "dtrain.compress(")


@pytest.mark.parametrize("base", ["zeros", "base.safetensors"])
def test_only_a_folder_can_be_run(run, texts, base):
    argv = ["compress", base, "tuned.safetensors", "d.safetensors", "--method=Wanda", "--calibration", texts]
    check_refusal(run(*argv), 2 if base == "zeros" else 1, "tuned.safetensors")


@pytest.mark.multiproc
def test_no_command_waits_for_what_only_a_calibration_takes():
    code = "import sys, dtrain.cli.commands; sys.exit(bool({'transformers', 'pyarrow', 'lightning'} & {*sys.modules}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize("module", ["transformers", "pyarrow"])
def test_what_is_not_installed_is_named(run, texts, module, monkeypatch):
    encoder()
    parquet.write_table(pyarrow.table({"a": ["x"]}), "t.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    check_refusal(
        run(*COMPRESS, "--method=Wanda", "--calibration", "t.parquet"), 1, module, "pip install 'dtrain[text]'"
    )
