"""What the small T5 is pre-trained on: spans, moved words, docstrings, and the order of examples."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import T5Config, T5ForConditionalGeneration

from parts import docstrings, spans, t5
from parts.corpus import split_english
from parts.sampling import SimilarLengths, in_two, representative
from tests.recipes.small_t5 import sentences


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


def test_words_begin_where_the_tokenizer_says():
    tokenizer = spans.train_tokenizer(sentences(300, 0))
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


@pytest.mark.parametrize("count", [203, 1000])
def test_a_limited_validation_sees_texts_of_all_lengths(count):
    lengths = [*range(count)]  # what is sorted would begin with the shortest
    order = representative(lengths, 8)
    assert sorted(order) == lengths
    assert order == representative(lengths, 8)
    batches = [order[start : start + 8] for start in range(0, count - 7, 8)]
    assert max(max(batch) - min(batch) for batch in batches) < 20
    for few in (1, 3, 5, 9):
        assert sum(order[: 8 * few]) / (8 * few) == pytest.approx(count / 2, rel=0.2)


def test_there_are_two_batches_wherever_there_are_two_rows():
    assert [in_two(rows, 32) for rows in (100, 64, 63, 33, 5, 2, 1, 0)] == [32, 32, 32, 17, 3, 1, 1, 1]
