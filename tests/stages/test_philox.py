"""The generator behind every mask: published vectors, and word for word the pure-Python one."""

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.stages.philox import philox4x32, random_order, stream_key, words
from tests.artifact import reference_stages as reference

ONES = 0xFFFFFFFF
VECTORS = [  # Random123, kat_vectors, philox4x32-10
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
BLOCKS = 1 << 15  # blocks that `words` computes at a time


def expected(seed, name, first, count):
    return list(islice(reference.words(seed, name, first), count))


@pytest.mark.parametrize(("counter", "key", "block"), VECTORS)
def test_published_vectors(counter, key, block):
    assert tuple(int(word) for word in philox4x32([torch.tensor(c) for c in counter], key)) == block
    assert reference.philox(counter, key) == block


@given(st.integers(0, 2**64 - 1), st.text(max_size=20), st.integers(0, 2**61))
def test_words_agree_with_pure_python(seed, name, block):
    assert words(stream_key(seed, name), 4 * block, 12).tolist() == expected(seed, name, 4 * block, 12)


@pytest.mark.parametrize("first", [0, 4, 4 * (2**32 - 2)], ids=["start", "offset", "counter carries"])
def test_words_do_not_depend_on_chunks(first):
    key = stream_key(1, "w")
    long = words(key, first, 4 * (BLOCKS + 4))
    assert long[-32:].tolist() == expected(1, "w", first + 4 * (BLOCKS - 4), 32)
    assert torch.equal(long[: 4 * BLOCKS], words(key, first, 4 * BLOCKS))
    assert torch.equal(long[4 * BLOCKS :], words(key, first + 4 * BLOCKS, 16))


def test_words_do_not_depend_on_threads():
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(words(stream_key(3, "w"), 0, 4 * 40_000))
    assert torch.equal(*found)


def test_no_words():
    assert words(stream_key(0, ""), 0, 0).shape == (0,)


@given(st.lists(st.integers(0, 3) | st.just(2**31 - 1), max_size=40), st.integers(0, 2**64 - 1))
def test_a_random_order_is_that_of_level_and_word(levels, seed):
    drawn = expected(seed, "w", 0, len(levels))
    order = sorted(range(len(levels)), key=lambda i: (levels[i], drawn[i], i))
    assert random_order(seed, "w", torch.tensor(levels, dtype=torch.int64)).tolist() == order


@pytest.mark.parametrize("seed", [0, 1, 2**63, 2**64 - 1])
def test_words_are_uniform(seed):
    """Mean and each bit's share over 2**17 words, within five standard deviations."""
    drawn = words(stream_key(seed, "layer.weight"), 0, 1 << 17)
    assert int(drawn.min()) >= 0
    assert int(drawn.max()) < 1 << 32
    assert abs(float(drawn.double().mean()) / 2**32 - 0.5) < 5 * (12 * 2**17) ** -0.5
    shares = ((drawn[:, None] >> torch.arange(32)) & 1).double().mean(0)
    assert float((shares - 0.5).abs().max()) < 5 * 0.5 * 2**-8.5
