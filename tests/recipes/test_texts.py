"""Tasks of GLUE, their columns and metrics, the English they can be made of, and what a linear probe sees."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from dtrain.errors import InputError
from parts import corpus, masked, probe
from parts.encoders import encode
from parts.glue import TASKS, answers, find_task, task_metrics
from parts.texts import TextData, read_texts

#: The columns, the number of classes and the metrics of GLUE, from its paper and the cards of `nyu-mll/glue`.
GLUE = {
    "cola": (("sentence",), 2, ("matthews",)),
    "sst2": (("sentence",), 2, ("accuracy",)),
    "mrpc": (("sentence1", "sentence2"), 2, ("f1", "accuracy")),
    "stsb": (("sentence1", "sentence2"), 0, ("pearson", "spearman")),
    "qqp": (("question1", "question2"), 2, ("f1", "accuracy")),
    "mnli": (("premise", "hypothesis"), 3, ("accuracy",)),
    "qnli": (("question", "sentence"), 2, ("accuracy",)),
    "rte": (("sentence1", "sentence2"), 2, ("accuracy",)),
    "wnli": (("sentence1", "sentence2"), 2, ("accuracy",)),
}


@pytest.mark.parametrize("name", GLUE)
def test_every_task_of_glue_is_read_from_its_columns(tmp_path, name):
    columns, classes, metrics = GLUE[name]
    task = TASKS[name]
    assert (task.columns, len(task.labels), task.metrics) == (columns, classes, metrics)
    labels = [index % classes for index in range(6)] if classes else [0.0, 0.4, 1.5, 3.25, 4.0, 5.0]
    for split in ("train", *task.validation, "test"):
        texts = {column: [f"{split} {column} {index}" for index in range(6)] for column in columns}
        given = labels if split != "test" else [-1] * 6  # GLUE keeps those of the test split
        (tmp_path / name).mkdir(exist_ok=True)
        for part in (0, 1):
            half = slice(3 * part, 3 * part + 3)
            rows = {**{key: values[half] for key, values in texts.items()}, "label": given[half]}
            pq.write_table(pa.table(rows), tmp_path / name / f"{split}-0000{part}-of-00002.parquet")
    found = read_texts(str(tmp_path), task)
    assert set(found) == {"train", *task.validation}
    for split, texts in found.items():
        assert texts.rows[4] == tuple(f"{split} {column} 4" for column in columns)
        assert texts.labels.tolist() == pytest.approx(labels)
        assert texts.labels.dtype == (torch.int64 if classes else torch.float32)


def test_metrics_are_those_of_their_definitions():
    generator = torch.Generator().manual_seed(1)
    logits, truth = torch.randn(50, 2, generator=generator), torch.randint(2, (50,), generator=generator)
    for name, other in (("cola", matthews_corrcoef), ("mrpc", f1_score)):
        metrics = task_metrics(TASKS[name])
        metrics.update(answers(TASKS[name], logits), truth)
        found = metrics.compute()
        assert float(found[TASKS[name].metrics[0]]) == pytest.approx(other(truth, logits.argmax(-1)), abs=1e-6)
    for one_sided, other in (([1, 1, 1], [1, 0, 1]), ([1, 0, 1], [1, 1, 1])):
        metrics = task_metrics(TASKS["cola"])
        metrics.update(torch.tensor(one_sided), torch.tensor(other))
        assert float(metrics.compute()["matthews"]) == matthews_corrcoef(other, one_sided) == 0
    numbers, right = torch.randn(50, 1, generator=generator), torch.randn(50, generator=generator)
    metrics = task_metrics(TASKS["stsb"])
    metrics.update(answers(TASKS["stsb"], numbers), right)
    found = metrics.compute()
    for name, other in (("pearson", pearsonr), ("spearman", spearmanr)):
        assert float(found[name]) == pytest.approx(other(numbers.squeeze(1), right)[0], abs=1e-5)


def test_a_task_is_called_as_its_folder_or_as_asked():
    assert find_task("some/where/cola").name == "cola"
    assert find_task("some/where/cola", "sst2").name == "sst2"
    assert find_task("nyu-mll/glue").name == "sst2"
    assert find_task("english").name == "word_order"
    with pytest.raises(InputError, match=r"no task 'reviews'; there are cola.*set --data\.task"):
        find_task("some/where/reviews")


def write(folder, **columns):
    for split in ("train", "validation"):
        pq.write_table(pa.table(columns), folder / f"{split}.parquet")


@pytest.mark.parametrize(
    ("task", "columns", "sentence"),
    [
        ("sst2", {"text": ["a"], "label": [1]}, r"the columns are \['text', 'label'\], without \['sentence'\]"),
        ("rte", {"premise": ["a"], "hypothesis": ["b"], "label": [1]}, "They fit mnli: see --data.task"),
        ("sst2", {"sentence": ["a", "b"], "label": [0, 2]}, r"are 0 \(negative\), 1 \(positive\); found \['2'\]"),
        ("sst2", {"sentence": ["a"], "label": ["good"]}, r"found \[\"'good'\"\]"),
        ("stsb", {"sentence1": ["a"], "sentence2": ["b"], "label": ["high"]}, "needs numbers as labels"),
        ("sst2", {"sentence": ["a", None], "label": [0, 1]}, "row 1 has no text"),
    ],
)
def test_columns_and_labels_that_do_not_fit_get_a_sentence(tmp_path, task, columns, sentence):
    write(tmp_path, **columns)
    with pytest.raises(InputError, match=sentence):
        read_texts(str(tmp_path), TASKS[task])


def test_a_folder_without_data_gets_a_sentence(tmp_path):
    with pytest.raises(InputError, match="holds no Parquet files"):
        read_texts(str(tmp_path), TASKS["sst2"])
    (tmp_path / "train.parquet").write_bytes(b"PAR1 no such thing")
    with pytest.raises(InputError, match="cannot be read"):
        read_texts(str(tmp_path), TASKS["sst2"])


def test_held_out_rows_are_not_trained_on(tmp_path):
    write(tmp_path, sentence=[f"text {index}" for index in range(40)], label=[0, 1] * 20)
    data = TextData(str(tmp_path), "sst2", batch_size=8, calibration=10, train_limit=20)
    held, trained = (set(data.parts[name].rows) for name in ("calibration", "train"))
    assert (len(held), len(trained), len(held & trained)) == (10, 20, 0)
    assert [len(labels) for _, labels in data.calibration_dataloader()] == [5, 5]
    texts, labels = next(iter(data.train_dataloader()))
    assert (len(texts), len(texts[0]), labels.dtype) == (1, 8, torch.int64)
    with pytest.raises(InputError, match="4 training rows are left"):
        TextData(str(tmp_path), "sst2", batch_size=8, calibration=10, train_limit=4)


def test_rows_to_fit_on_are_of_sentences_that_are_not_trained_on():
    trained, held = (TextData("english", calibration=128).parts[name].rows for name in ("train", "calibration"))
    assert len({*held}) == len(held) == 128
    assert not {tuple(sorted(row.split())) for (row,) in held} & {tuple(sorted(row.split())) for (row,) in trained}
    with pytest.raises(InputError, match=r"--data\.calibration is 9000, but \d+ rows are held out"):
        TextData("english", calibration=9000)


def test_no_document_is_in_two_splits():
    splits = corpus.split_english()
    train, val, held = ({text for document in part for text in document} for part in splits.values())
    assert len(train) > 1000
    assert len(val) > 200
    assert len(held) > 100
    assert len(train | val | held) == len(train) + len(val) + len(held)
    assert {text for document in corpus.to_pretrain() for text in document} == train | held
    assert all(len(document) > 1 for part in splits.values() for document in part)


@pytest.mark.parametrize("task", ["word_order", "next_sentence"])
def test_offline_tasks_are_balanced_and_made_of_their_own_documents(task):
    sides = {name: {text for document in part for text in document} for name, part in corpus.split_english().items()}
    found = read_texts("english", TASKS[task])
    assert set(found) == {"train", "validation", "calibration"}
    for name, texts in found.items():
        assert float(texts.labels.double().mean()) == 0.5
        assert len(texts.rows) == len(texts.labels) > 256
        intact = [row for row, label in zip(texts.rows, texts.labels.tolist(), strict=True) if label]
        assert all(text in sides[name] for row in intact for text in row)
    assert read_texts("english", TASKS[task])["train"].rows == found["train"].rows


def test_swapped_sentences_keep_their_words_and_their_ends():
    texts = read_texts("english", TASKS["word_order"])["validation"]
    for (intact,), (other,) in zip(texts.rows[::2], texts.rows[1::2], strict=True):
        before, after = intact.split(), other.split()
        assert before != after
        assert sorted(before) == sorted(after)
        assert (before[0], before[-1]) == (after[0], after[-1])


def test_pairs_follow_each_other_or_come_from_elsewhere():
    where = {text: (i, j) for i, document in enumerate(corpus.english()) for j, text in enumerate(document)}
    texts = read_texts("english", TASKS["next_sentence"])["validation"]
    for (first, second), label in zip(texts.rows, texts.labels.tolist(), strict=True):
        (document, place), (other, next_place) = where[first], where[second]
        assert (document == other and next_place == place + 1) if label else document != other


def test_texts_are_padded_to_the_longest_of_the_batch_and_cut():
    tokenizer = masked.train_tokenizer(["the name is bound to the object", "the statement is executed"])
    found = encode(tokenizer, [("the name", "the name is bound to the object")], 128, torch.device("cpu"))
    assert set(found) == {"input_ids", "attention_mask"}
    assert found["attention_mask"].sum(1).max() == found["input_ids"].shape[1]
    pair = [("the name is bound to the object",), ("the statement is executed",)]
    ids = encode(tokenizer, pair, 8, torch.device("cpu"))["input_ids"]
    assert ids.shape == (1, 8)
    assert (ids == masked.END).sum() == 3  # RoBERTa: <s> a </s></s> b </s>


def test_masked_batches_hide_a_share_and_learn_every_position():
    tokens = torch.arange(5, 405)
    stage = (50, 16, 8, 40)
    found = list(masked.windows(tokens, stage, torch.Generator().manual_seed(0)))
    hidden = torch.cat([batch.hidden for batch in found])
    seen = torch.cat([batch.tokens for batch in found])
    assert float(hidden.double().mean()) == pytest.approx(masked.RATE, abs=0.02)
    assert float((seen[hidden] == masked.MASK).double().mean()) == pytest.approx(0.8, abs=0.03)
    positions = torch.cat([batch.positions for batch in found]).unique().tolist()
    assert positions == list(range(2, 2 + 40 + 16))
    for batch in found:
        whole = batch.tokens.masked_scatter(batch.hidden, batch.truth)
        assert torch.equal(whole.diff(), torch.ones(8, 15, dtype=torch.long))


def test_the_small_base_is_made_once_in_the_layout_of_the_hub(tmp_path, monkeypatch):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    monkeypatch.setattr(masked, "CACHE", tmp_path / "base")
    before = torch.random.get_rng_state()
    folder = masked.pretrain_on_english(((2, 12, 4, 0), (2, 24, 2, 80)))
    assert torch.equal(before, torch.random.get_rng_state())
    written = (folder / "model.safetensors").read_bytes()
    assert masked.pretrain_on_english().joinpath("model.safetensors").read_bytes() == written
    model, found = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert all(name.startswith("classifier.") for name in found["missing_keys"])
    assert not found["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == model.config.vocab_size


def test_a_probe_of_numbers_is_a_ridge_regression():
    generator = torch.Generator().manual_seed(0)
    states, direction = torch.randn(300, 8, generator=generator), torch.randn(8, generator=generator)
    truth = states @ direction + 0.01 * torch.randn(300, generator=generator)
    batches = [(part, labels) for part, labels in zip(states.split(50), truth.split(50), strict=True)]
    found, asked = probe.probe_states(lambda inputs: inputs, batches[:4], batches[4:])
    assert torch.equal(asked, truth[200:])
    assert torch.allclose(found, asked, atol=0.1)
    found, asked = probe.probe_states(
        lambda inputs: inputs, [(x, (y > 0).long()) for x, y in batches[:4]], [(x, (y > 0).long()) for x, y in batches]
    )
    assert float((found == asked).double().mean()) > 0.95
