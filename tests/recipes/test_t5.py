"""T5 as text to text: prompts, ranked and written answers, and models that do not fit."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtrain
from parts import spans, t5
from parts.glue import TASKS
from tests.recipes.small_t5 import save_t5, sentences


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models with and without an output layer of their own."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("tied", "untied"):
        save_t5(root / kind, tied=kind == "tied")
    return root


def loaded(folder: Path):
    model, tokenizer = t5.load_t5(folder)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("task", ["sst2", "mnli", "stsb"])
def test_rank_is_what_a_forward_pass_per_label_says(folders, kind, task):
    model, tokenizer = loaded(folders / kind)
    texts = t5.label_texts(TASKS[task])
    labels = t5.encode_labels(tokenizer, texts)
    inputs = t5.encode(tokenizer, sentences(3, 7), 64, torch.device("cpu"))
    assert not inputs["attention_mask"].all()  # some are padded
    with torch.no_grad():
        found = t5.log_likelihoods(model, inputs, labels)
        for row, text in ((row, text) for row in range(3) for text in range(len(texts))):
            alone = {
                name: value[row : row + 1, : inputs["attention_mask"][row].sum()] for name, value in inputs.items()
            }
            target = torch.tensor([tokenizer.encode(texts[text]).ids])
            mean = model(**alone, labels=target).loss
            assert found[row, text] == pytest.approx(-float(mean) * target.shape[1], abs=2e-4)
    assert torch.equal(t5.choose(TASKS["sst2"], found), found.argmax(-1))
    assert t5.choose(TASKS["stsb"], found)[0] == pytest.approx(float(found[0].argmax()) / 5)


def test_generation_takes_the_likeliest_token_every_time(folders):
    model, tokenizer = loaded(folders / "tied")
    inputs = t5.encode(tokenizer, sentences(4, 3), 64, torch.device("cpu"))
    written = torch.zeros(4, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(6):
            step = model(**inputs, decoder_input_ids=written).logits[:, -1].argmax(-1, keepdim=True)
            written = torch.cat([written, step], 1)
    ends = [row.index(1) if 1 in row else None for row in written.tolist()]
    texts = [tokenizer.decode(row[:end]).strip() for row, end in zip(written.tolist(), ends, strict=True)]
    assert t5.generate(model, tokenizer, inputs, 6) == texts


def test_an_answer_that_is_no_label_is_wrong():
    truth = torch.tensor([0, 1, 0, 1, 2])
    texts = ["entailment", "neutral", "entail", "", "contradiction"]
    answers = t5.read_answers(TASKS["mnli"], texts, truth)
    assert (answers == truth).tolist() == [True, True, False, False, True]
    assert set(answers.tolist()) <= {0, 1, 2}
    numbers = t5.read_answers(TASKS["stsb"], ["2.6", "3", "-0.5", "nan", "inf", "two", ""], torch.zeros(7))
    assert numbers.tolist() == pytest.approx([2.6, 3, -0.5, -1, -1, -1, -1])


def test_one_answer_for_all_has_no_correlation_and_says_so():
    with pytest.warns(UserWarning, match="coefficient to nan"):
        found = t5.score(TASKS["stsb"], torch.full((4,), -1.0), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert math.isnan(found)
    assert t5.score(TASKS["cola"], torch.ones(4, dtype=torch.long), torch.tensor([0, 1, 1, 1])) == 0  # by definition


def test_prompts_are_those_of_the_paper():
    assert t5.prompt(TASKS["sst2"], ("it works .",)) == "sst2 sentence: it works ."
    assert t5.prompt(TASKS["mnli"], ("a cat sat", "it sat")) == "mnli hypothesis: it sat premise: a cat sat"
    assert t5.prompt(TASKS["stsb"], ("a", "b")) == "stsb sentence1: a sentence2: b"
    assert t5.prompt(TASKS["qnli"], ("why", "so")) == "qnli question: why sentence: so"
    assert t5.label_texts(TASKS["cola"]) == ["unacceptable", "acceptable"]


def test_numbers_are_rounded_to_a_fifth():
    texts = t5.label_texts(TASKS["stsb"])
    assert (texts[0], texts[13], texts[-1], len(texts)) == ("0.0", "2.6", "5.0", 26)
    chosen = t5.label_ids(TASKS["stsb"], torch.tensor([0.0, 2.57, 2.69, 2.8, 5.0]))
    assert [texts[which] for which in chosen] == ["0.0", "2.6", "2.6", "2.8", "5.0"]
    assert t5.label_ids(TASKS["sst2"], torch.tensor([1, 0])).tolist() == [1, 0]


def broken_folder(folders: Path, where: Path, what: str) -> str:
    """Return a copy of the tied model with one thing wrong."""
    shutil.copytree(folders / "tied", where)
    config = json.loads((where / "config.json").read_text())
    saved = (where / "model.safetensors", {"format": "pt"})
    if what == "vocabulary":
        tokenizer = spans.train_tokenizer(["a b"])
        tokenizer.add_tokens([f"word{i}" for i in range(3000)])
        tokenizer.save(str(where / "tokenizer.json"))
    elif what == "end":
        tokenizer = json.loads((where / "tokenizer.json").read_text())
        (where / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    elif what == "kind":
        (where / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    elif what == "names":
        weights = load_file(where / "model.safetensors")
        save_file({name.replace("encoder.block", "encoder.layers"): value for name, value in weights.items()}, *saved)
    elif what == "embedding":
        weights = load_file(where / "model.safetensors")
        save_file({name: value for name, value in weights.items() if name != "shared.weight"}, *saved)
    elif what == "weights":
        (where / "model.safetensors").write_bytes(b"nonsense")
    else:
        (where / "tokenizer.json").unlink()
    return str(where)


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        ("vocabulary", r"knows 30\d\d tokens, but the model has \d+"),
        ("end", "does not end a text with token 1"),
        ("kind", "holds a model of type 'bert', not a T5"),
        ("weights", "cannot be read as a T5"),
        ("names", r"lacks \d+ tensors.*, such as encoder\.block\..* It has encoder\.layers\..* instead"),
        ("embedding", r"lacks 4 tensors.*, such as decoder\.embed_tokens\.weight"),
        ("tokenizer", "has no tokenizer.json"),
    ],
)
def test_a_broken_model_gets_a_sentence(folders, tmp_path, what, sentence):
    with pytest.raises(dtrain.InputError, match=sentence):
        t5.load_t5(Path(broken_folder(folders, tmp_path / "broken", what)))


def test_labels_that_are_one_to_the_tokenizer_are_refused(folders):
    _, tokenizer = t5.load_t5(folders / "tied")
    with pytest.raises(dtrain.InputError, match="the same to the tokenizer"):
        t5.encode_labels(tokenizer, ["Ω", "Ψ"])
