"""Pairs of images with statements: what can be guessed from a part of them, and the two places they come from."""

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pil
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import one_hot

import dtrain
from parts.digit_pairs import KINDS, NUMBERS, PAD, WordTokenizer, pad_tokens
from parts.image_pairs import ImagePairs
from parts.images import read_digits

COUNT, HELD = 6000, 1000
CHANCE = pytest.approx(0.5, abs=0.045)  # three standard errors of a thousand answers


def claims(kind: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Many draws of a kind: left digits, right digits, statements, and whether they are true."""
    rng = np.random.default_rng(7)
    answers = np.arange(COUNT) % 2
    left, right, said = zip(*(KINDS[kind](rng, bool(answer)) for answer in answers), strict=True)
    return np.array(left), np.array(right), np.array(said), answers


def guessed(answers: np.ndarray, *seen: np.ndarray) -> float:
    """Share of right answers, where it did not learn, of a logistic regression with a column per combination seen."""
    which = np.zeros(len(answers), dtype=np.int64)
    for values in seen:
        which = which * 100 + np.unique(values, return_inverse=True)[1]
    x = one_hot(torch.tensor(np.unique(which, return_inverse=True)[1])).numpy().astype(np.float32)
    probe = LogisticRegression(max_iter=300).fit(x[:-HELD], answers[:-HELD])
    return probe.score(x[-HELD:], answers[-HELD:])


@pytest.mark.parametrize("kind", KINDS)
def test_statements_are_true_when_they_say_so(kind):
    number = {word: value for value, word in enumerate(NUMBERS)}
    for left, right, said, answer in zip(*claims(kind), strict=True):
        named, other = (left, right) if "left" in said else (right, left)
        truth = {
            "shows": lambda: named == number[said.split()[-1]],  # noqa: B023 - called at once
            "same": lambda: (left == right) == ("same" in said),  # noqa: B023
            "parity": lambda: ((left + right) % 2 == 0) == ("even" in said),  # noqa: B023
            "order": lambda: named > other if "larger" in said else named < other,  # noqa: B023
        }[kind]()
        assert truth == bool(answer), (left, right, said)
        assert {left, right} <= set(range(10))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_needed_to_answer(kind):
    left, right, said, answers = claims(kind)
    assert guessed(answers, said) == CHANCE
    assert guessed(answers, left) == CHANCE
    assert guessed(answers, right) == CHANCE
    assert guessed(answers, left, right) == CHANCE  # any function of both images
    if kind in ("same", "parity"):
        assert guessed(answers, said, left) == CHANCE
        assert guessed(answers, said, right) == CHANCE
    if kind == "order":  # a nine is never the smaller one; which digits are near keeps that below two thirds
        assert guessed(answers, said, left) < 0.68
    if kind != "shows":  # where there are two thousand combinations to learn
        assert guessed(answers, left, right, said) > 0.95


def test_pixels_and_words_alone_stay_at_chance():
    data = ImagePairs(pairs=4000)
    (left, right, tokens, _, labels), (*seen, answers) = (data.split(name).tensors for name in ("train", "val"))
    words = [one_hot(ids, len(data.tokenizer)).amax(1).float() for ids in (tokens, seen[2])]
    pixels = [torch.cat([a.flatten(1), b.flatten(1)], 1).float() / 255 for a, b in ((left, right), seen[:2])]
    for train, val in (words, pixels):
        probe = LogisticRegression(max_iter=1000, C=0.01).fit(train.numpy(), labels.numpy())
        assert probe.score(val.numpy(), answers.numpy()) == CHANCE


def test_every_kind_has_as_many_true_as_false_statements():
    data = ImagePairs(pairs=800, kinds=["parity", "order"])
    said = ["digits is" in text for text in texts(data, "train")]
    labels = data.split("train").tensors[4]
    for kind in (True, False):
        assert labels[[index for index, parity in enumerate(said) if parity == kind]].tolist().count(1) == 200


def texts(data, name: str) -> list[str]:
    word = {index: text for text, index in data.tokenizer.ids.items()}
    return [" ".join(word[i] for i in ids if i > 2) for ids in data.split(name).tensors[2].tolist()]


def test_the_parts_have_no_image_in_common_and_follow_the_seed():
    first, again, other = (ImagePairs(pairs=2000, seed=seed) for seed in (0, 0, 1))
    images = {}
    for name in ("train", "calibration", "val"):
        left, right, *_ = first.split(name).tensors
        images[name] = {image.numpy().tobytes() for image in torch.cat([left, right])}
        assert all(torch.equal(a, b) for a, b in zip(first.split(name).tensors, again.split(name).tensors, strict=True))
        same = torch.equal(first.split(name).tensors[0], other.split(name).tensors[0])
        assert same == (name != "train")  # scores of several seeds are of the same pairs
    # Two of the 1,797 pictures may be equal pixel by pixel; here none of those that were drawn are.
    assert not images["train"] & images["val"]
    assert not images["calibration"] & (images["train"] | images["val"])
    known = {image.numpy().tobytes() for image in read_digits()[1][0]}
    assert images["val"] <= known


def test_batches():
    data = ImagePairs(pairs=256, batch_size=32)
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch[4] for batch in loader])
        assert len(epochs[-1]) == 8
    assert torch.equal(torch.cat(epochs[0]), torch.cat(epochs[2]))
    assert not torch.equal(torch.cat(epochs[0]), torch.cat(epochs[1]))
    left, right, tokens, padding, labels = data.augmented(data.normalise(next(iter(loader))))
    assert left.shape == right.shape == (32, 3, 8, 8)
    assert left.dtype == torch.float32
    assert left.min() == -1
    assert left.max() == 1
    assert tokens.shape == padding.shape
    assert torch.equal(padding, tokens == PAD)
    assert (tokens.dtype, padding.dtype, labels.dtype) == (torch.int64, torch.bool, torch.int64)
    assert (tokens[:, 0] == 0).all()
    assert ((tokens == 2).sum(1) == 1).all()
    assert not (tokens == 3).any()


def test_there_are_two_batches_to_fit_on_however_few_pairs_are_held_out():
    data = [ImagePairs(pairs=64, calibration=rows) for rows in (200, 64, 3)]
    sizes = [[len(batch[4]) for batch in part.calibration_dataloader()] for part in data]
    assert sizes == [[64, 64, 64, 8], [32, 32], [2, 1]]


def test_words_that_were_never_said():
    tokenizer = WordTokenizer()
    assert tokenizer("The left cat") == [0, tokenizer.ids["the"], tokenizer.ids["left"], 3, 2]
    tokens, padding = pad_tokens([[0, 7, 8, 9, 2], [0, 7, 2]], most=4)
    assert tokens.tolist() == [[0, 7, 8, 2], [0, 7, 2, 1]]
    assert padding.tolist() == [[False] * 4, [False] * 3 + [True]]


def write_nlvr2(folder: Path, label: str = "label", statement: str = "sentence", answers=("True", "False")) -> Path:
    """A data set in the schema of NLVR2 and its mirrors, of pictures of many sizes; the left one is brighter."""
    folder.mkdir()
    for split, count in (("train", 24), ("dev", 8)):
        sizes = [(20 + index, 30) for index in range(count)]
        rows = {
            "left_image": [Pil.new("RGB", size, (200, 10 * index, 0)) for index, size in enumerate(sizes)],
            "right_image": [Pil.new("L", size, 40) for size in sizes],
            statement: [f"the {'left' if index % 2 else 'right'} image is dark" for index in range(count)],
            label: [answers[index % len(answers)] for index in range(count)],
        }
        kinds = {"left_image": Image(), "right_image": Image(), statement: Value("string")}
        kinds[label] = Value("string") if isinstance(answers[0], str) else Value("bool")
        (folder / "data").mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=Features(kinds)).to_parquet(
            folder / "data" / f"{split}-00000-of-00001.parquet"
        )
    return folder


@pytest.mark.parametrize(
    "schema", [{}, {"label": "answer", "statement": "question"}, {"answers": (True, False)}], ids=str
)
def test_nlvr2_is_read_from_a_local_folder(tmp_path, schema):
    folder = write_nlvr2(tmp_path / "nlvr2", **schema)
    data = ImagePairs(str(folder), image_size=16, batch_size=4, calibration=6)
    assert [len(data.split(name)) for name in ("train", "calibration", "val")] == [18, 6, 8]
    left, right, tokens, padding, labels = next(iter(data.val_dataloader()))
    assert left.shape == right.shape == (8, 3, 16, 16)
    assert (left.dtype, labels.dtype, tokens.dtype) == (torch.uint8, torch.int64, torch.int64)
    assert left[3, :, 5, 5].tolist() == [200, 30, 0]
    assert (right == 40).all()
    assert labels.tolist() == [1, 0] * 4
    assert tokens[0].tolist() == data.tokenizer("the right image is dark")
    assert not padding.any()
    assert data.normalise((left, right, tokens, padding, labels))[1].unique().tolist() == pytest.approx(
        [40 / 127.5 - 1]
    )
    trained = {int(row[0][1, 5, 5]) for row in data.split("train")}
    assert not trained & {int(row[0][1, 5, 5]) for row in data.split("calibration")}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kinds": ["shows", "colour"]}, r"\['colour'\]; the kinds of statements are \['shows', 'same'"),
        ({"dataset": "no/such/folder"}, "cannot be loaded"),
        ({"pairs": 8}, "8 training pairs are left"),
    ],
)
def test_bad_input_gets_a_sentence(arguments, sentence):
    with pytest.raises(dtrain.InputError, match=sentence):
        ImagePairs(**arguments).split("train")


def test_bad_columns_and_labels_get_a_sentence(tmp_path):
    with pytest.raises(dtrain.InputError, match="there is no sentence or question"):
        ImagePairs(str(write_nlvr2(tmp_path / "a", statement="text")), image_size=16).split("train")
    with pytest.raises(dtrain.InputError, match="'maybe' is no label"):
        ImagePairs(str(write_nlvr2(tmp_path / "b", answers=("True", "maybe")))).split("train")
