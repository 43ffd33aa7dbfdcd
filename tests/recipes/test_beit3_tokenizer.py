"""The sentencepiece tokenizer against transformers' own reading of the same file."""

import io
import sys

import pytest
from sentencepiece import SentencePieceTrainer
from transformers import XLMRobertaTokenizer

import dtrain
from parts.beit3_tokenizer import Beit3Tokenizer

SENTENCES = [
    f"the {side} image shows {count} dogs that {act}, and the other a {thing}."
    for side in ("left", "right")
    for count in ("two", "three", "no")
    for act in ("run", "sleep", "play with a ball")
    for thing in ("cat", "house near the sea", "lamp")
]


def train(path, **settings):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_writer=model, vocab_size=40, minloglevel=2, **settings
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "sentencepiece.bpe.model")  # the name that transformers wants


@pytest.mark.parametrize("text", [SENTENCES[0], "  Two DOGS,\tsleeping…", "", "the zebra quits 42 猫"])
def test_the_ids_are_those_of_transformers(spm, text):
    theirs = XLMRobertaTokenizer.from_pretrained(spm.parent)
    ids = Beit3Tokenizer(spm)(text)
    assert ids == theirs(text)["input_ids"]
    assert (ids[0], ids[-1]) == (0, 2)


def test_the_special_ids(spm):
    tokenizer = Beit3Tokenizer(str(spm))
    assert 3 in tokenizer("猫")
    assert len(tokenizer) == 42  # one for padding, one for the mask
    seen = {piece for text in SENTENCES for piece in tokenizer(text)[1:-1]}
    assert min(seen) >= 4
    assert max(seen) < 41


def test_what_is_no_tokenizer_is_refused(tmp_path, spm, monkeypatch):
    with pytest.raises(dtrain.InputError, match=r"no tokenizer at none.spm.*beit3\.spm"):
        Beit3Tokenizer("none.spm")
    (tmp_path / "text.spm").write_text("hello" * 20)
    with pytest.raises(dtrain.InputError, match=r"text\.spm is no sentencepiece model"):
        Beit3Tokenizer(tmp_path / "text.spm")
    other = train(tmp_path / "t5.spm", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    with pytest.raises(dtrain.InputError, match=r"numbers <unk>, <s> and </s> \(2, -1, 1\)"):
        Beit3Tokenizer(other)
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(dtrain.InputError, match="pip install"):
        Beit3Tokenizer(spm)
