"""T5 on GLUE: the parts by themselves, and the recipe as a user runs it from local folders."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import dtrain
from parts import docstrings, spans, t5
from parts.corpus import split_english
from parts.glue import TASKS
from parts.sampling import SimilarLengths

# Lightning, its loggers and transformers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
WORDS = ["the", "a", "film", "plot", "was", "is", "very", "dull", "bright", "one", "two", "three", "good", "bad"]
OLD_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # T5's first files have it


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 10))) for _ in range(count)]


def save_t5(folder: Path, *, tied: bool) -> None:
    """Write a random T5 (or a T5 v1.1, whose output layer is a tensor of its own) in the layout of the Hub."""
    torch.manual_seed(0)
    tokenizer = spans.train_tokenizer([*sentences(300, 0), "sst2 stsb sentence: positive negative 0.2 3.4 5.6 7.8 9.1"])
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
    )
    model = T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) / 6)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if tied:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, OLD_BIAS: torch.randn(32, 4)}, folder / "model.safetensors", {"format": "pt"})


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
        return printed.out

    return run


def loaded(folder: Path):
    model, tokenizer = t5.load_t5(folder)
    return model.eval(), tokenizer


@pytest.mark.parametrize("kind", ["tied", "untied"])
@pytest.mark.parametrize("task", ["sst2", "mnli", "stsb"])
def test_rank_is_what_a_forward_pass_per_label_says(folders, kind, task):
    model, tokenizer = loaded(folders / kind)
    texts = t5.label_texts(TASKS[task])
    labels = t5.encode_labels(tokenizer, texts)
    inputs = t5.encode(tokenizer, sentences(5, 7), 64, torch.device("cpu"))
    assert not inputs["attention_mask"].all()  # some are padded
    with torch.no_grad():
        found = t5.log_likelihoods(model, inputs, labels)
        for row, text in ((row, text) for row in range(5) for text in range(len(texts))):
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


def test_the_score_of_one_answer_for_all_is_zero():
    assert t5.score(TASKS["stsb"], torch.full((4,), -1.0), torch.tensor([0.0, 1.0, 2.0, 3.0])) == 0


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


@given(st.lists(st.integers(3, 99), min_size=2, max_size=80), st.integers(0, 2**31))
def test_what_was_kept_and_what_was_masked_is_the_text(tokens, seed):
    sentinels = list(range(200, 230))
    source, target = spans.corrupt(tokens, sentinels, torch.Generator().manual_seed(seed))
    used = [token for token in target if token >= 200]
    assert used == sentinels[: len(used)]
    assert target[-1] == used[-1]  # which stands for no span
    assert [token for token in source if token >= 200] == used[:-1]
    starts = [target.index(sentinel) for sentinel in used]
    hidden = {target[a]: target[a + 1 : b] for a, b in pairwise(starts)}
    assert all(hidden.values())
    assert [token for piece in source for token in hidden.get(piece, [piece])] == tokens
    assert sum(map(len, hidden.values())) == min(max(round(0.15 * len(tokens)), 1), len(tokens) - 1)


def test_every_place_but_the_first_is_masked_about_as_often():
    generator = torch.Generator().manual_seed(0)
    length, draws = 60, 3000
    counts, spans_drawn = torch.zeros(length), 0
    for _ in range(draws):
        source, target = spans.corrupt(range(3, length + 3), range(100, 120), generator)
        counts[[token - 3 for token in target if token < 100]] += 1
        spans_drawn += sum(token >= 100 for token in source)
    assert counts.sum() / (length * draws) == pytest.approx(0.15)
    assert counts.sum() / spans_drawn == pytest.approx(3)
    middle = counts[12:48] / draws
    deviation = (0.15 * 0.85 / draws) ** 0.5
    assert counts[0] == 0
    assert (middle - middle.mean()).abs().max() < 4 * deviation


def test_words_move_a_little():
    generator = torch.Generator().manual_seed(0)
    words = [[2 * i, 2 * i + 1] for i in range(40)]
    for _ in range(50):
        tokens = spans.shuffle(words, generator)
        places = [token // 2 for token in tokens[::2]]
        assert tokens == [token for place in places for token in words[place]]
        assert max(abs(place - own) for own, place in enumerate(places)) < spans.NEAR
        assert sorted(places) == list(range(40)) != places


def test_words_begin_where_the_tokenizer_says(folders):
    _, tokenizer = t5.load_t5(folders / "tied")
    ids = tokenizer.encode("the film was dull", add_special_tokens=False).ids
    words = spans.to_words(tokenizer, ids)
    assert [tokenizer.decode(word) for word in words] == ["the", "film", "was", "dull"]


def test_all_ways_to_cut_are_equally_likely():
    generator = torch.Generator().manual_seed(0)
    drawn = [tuple(spans.parts_of(5, 3, generator)) for _ in range(3000)]
    assert {sum(parts) for parts in drawn} == {5}
    shares = {parts: drawn.count(parts) / 3000 for parts in set(drawn)}
    assert len(shares) == 6
    assert max(abs(share - 1 / 6) for share in shares.values()) < 4 * (5 / 36 / 3000) ** 0.5


def test_the_base_is_pretrained_once_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(spans, "CACHE", tmp_path / "base")
    monkeypatch.setattr(spans, "BATCH", 2)
    monkeypatch.setattr(spans, "docstrings", list)
    torch.manual_seed(5)
    folder = spans.pretrain_on_english(steps=2)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.rand(1) == after  # whether it was cached changes nothing that comes after
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    assert spans.pretrain_on_english(steps=2) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    model, tokenizer = t5.load_t5(folder)
    assert model.training
    spanned, shuffled = spans.exercises(tokenizer, 2)
    lengths = [sum(side.shape[1] for side in batch.values()) for batch in (spanned, shuffled)]
    assert lengths == [spans.LENGTH + 2 * 2 + 1 + 2, 2 * spans.LENGTH + 2]  # sentinels, ends
    assert torch.equal(shuffled["input_ids"].sort().values, shuffled["labels"].sort().values)


def test_a_small_base_begins_with_heads_for_the_neighbours():
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, decoder_start_token_id=0, **spans.SMALL))
    spans.look_at_neighbours(model)
    encoder, decoder = (stack.block[0].layer[0].SelfAttention for stack in (model.encoder, model.decoder))
    before, after, *_ = encoder.compute_bias(8, 8)[0].argmax(-1)
    assert before[1:].tolist() == list(range(7))
    assert after[:-1].tolist() == list(range(1, 8))
    assert decoder.compute_bias(8, 8)[0, 0].argmax(-1)[1:].tolist() == list(range(7))


def test_docstrings_are_read_once_and_not_where_validation_has_them(tmp_path, monkeypatch):
    held = split_english()["validation"][0][0]
    first, second = "This reads a file and returns it.", "It raises an error if there is none."
    source = f'def f():\n    """{first}\n    {second}\n\n    {held}\n    """\n'
    (tmp_path / "test").mkdir()
    for name in ("a.py", "b.py", "test/c.py"):
        (tmp_path / name).write_text(source.replace("file", "test") if "test" in name else source)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: tmp_path)
    assert docstrings.docstrings.__wrapped__() == [[first, second]]


def test_batches_have_similar_lengths_and_follow_from_the_epoch():
    lengths = np.random.default_rng(0).integers(1, 101, 203).tolist()
    sampler = SimilarLengths(lengths, 8, 0)
    first = list(sampler)
    assert len(first) == len(sampler) == len(set(first)) == 200
    assert list(sampler) == first
    spread = [
        max(b) - min(b) for b in ([lengths[i] for i in first[start : start + 8]] for start in range(0, len(first), 8))
    ]
    assert sum(spread) / len(spread) < 25  # of 80 in a batch drawn at random
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_the_file_gives_the_same_score_in_a_new_process(recipe, folders, tmp_path, kind):
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
    merge = [sys.executable, "-m", "dtrain", "apply", base, str(delta.origin), merged]
    subprocess.run(merge, check=True, capture_output=True, cwd=ROOT)
    again = recipe("--model.pretrained", base, "--evaluate", merged)
    for metric in ("val_score", "val_rank_accuracy", "val_generate_accuracy"):
        compressed = re.search(rf"{metric}\s*│[^│\n]*│[^│\n]*│\s*([\d.]+)", printed)[1]
        score = re.search(rf"{metric}\s*│\s*([\d.]+)", again)[1]
        assert float(score) == pytest.approx(float(compressed), abs=5e-5)
    model = loaded(Path(base))[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    delta.apply_(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in load_file(merged).items())
    assert (model.lm_head.weight is model.shared.weight) == (kind == "tied")
    delta.remove_(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_resumed_run_equals_the_unbroken_one_bit_for_bit(recipe, tmp_path):
    common = ("--trainer.max_epochs=2", "--trainer.max_steps=-1", "--checkpoint.save_top_k=-1", "--compare=false")
    whole = recipe(*common, "--fit=Search", cwd="unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    runs = [tmp_path / name / "runs/t5_glue" for name in ("unbroken", "broken")]
    for later in ("delta.safetensors", "checkpoints/last.ckpt"):
        (runs[1] / later).unlink()
    first = next((runs[1] / "checkpoints").glob("epoch=0*.ckpt"))
    resumed = recipe(*common, "--fit=Search", "--ckpt_path", str(first), cwd="broken")
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
    printed = recipe(
        "--data.task=stsb", "--model.scoring=generate", "--compress.fit_on=metric", "--fit=Search", "--compare=false"
    )
    for metric in ("val_rank_pearson", "val_rank_spearman", "val_generate_pearson", "val_generate_spearman"):
        assert metric in printed


def broken_folder(folders: Path, where: Path, what: str) -> str:
    """Return a copy of the tied model with one thing wrong."""
    shutil.copytree(folders / "tied", where)
    config = json.loads((where / "config.json").read_text())
    if what == "vocabulary":
        tokenizer = spans.train_tokenizer(["a b"])
        tokenizer.add_tokens([f"word{i}" for i in range(3000)])
        tokenizer.save(str(where / "tokenizer.json"))
    elif what == "end":
        tokenizer = json.loads((where / "tokenizer.json").read_text())
        (where / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    elif what == "kind":
        (where / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
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
        ("tokenizer", "has no tokenizer.json"),
    ],
)
def test_a_broken_model_gets_a_sentence(folders, tmp_path, what, sentence):
    with pytest.raises(dtrain.InputError, match=sentence):
        t5.load_t5(Path(broken_folder(folders, tmp_path / "broken", what)))


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


def test_labels_that_are_one_to_the_tokenizer_are_refused(folders):
    _, tokenizer = t5.load_t5(folders / "tied")
    with pytest.raises(dtrain.InputError, match="the same to the tokenizer"):
        t5.encode_labels(tokenizer, ["Ω", "Ψ"])


def test_printed_config_is_complete(recipe, capsys):
    with pytest.raises(SystemExit):
        recipe("--config", str(ROOT / "recipes" / "t5_glue.yaml"), "--print_config")
    printed = capsys.readouterr().out
    for key in ("method:", "adamr:", "compress:", "pretrained:", "scoring: rank", "strength: 0.001"):
        assert key in printed
