"""Entropy coding: at the entropy, readable by twenty lines of Python, and never fooled."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.stages.cursor import Cursor, varint
from dtrain.stages.rans import MAX_SYMBOLS, rans_decode, rans_encode
from tests.artifact import reference_stages as reference

SOURCES = {
    "skewed": torch.tensor([0.9, 0.05, 0.03, 0.02]),
    "very skewed": torch.tensor([0.98, 0.015, 0.005]),
    "two": torch.tensor([0.3, 0.7]),
    "uniform": torch.ones(8),
    "holes": torch.tensor([0.0, 0.5, 0.0, 0.0, 0.25, 0.25]),
    "geometric": 0.9 ** torch.arange(64),
    "bell": torch.exp(-0.5 * ((torch.arange(256) - 127) / 20) ** 2),
    "4096 symbols": torch.ones(MAX_SYMBOLS),
    "4096 symbols, bell": torch.exp(-0.5 * ((torch.arange(MAX_SYMBOLS) - 2047) / 372) ** 2),
}
every = pytest.mark.parametrize("weights", SOURCES.values(), ids=SOURCES.keys())


def raw_of(symbols):
    return bytes(rans_encode(symbols).tolist())


def drawn(weights, count):
    return torch.multinomial(weights, count, replacement=True)


def entropy(symbols):
    """Bytes that symbols of these frequencies need at least."""
    counts = torch.bincount(symbols).double()
    shares = counts[counts > 0] / symbols.numel()
    return -float((shares * shares.log2()).sum()) * symbols.numel() / 8


@given(
    st.sampled_from([2, 5, 256, 257, MAX_SYMBOLS]).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.integers(0, n - 1)))
    )
)
def test_round_trip(case):
    limit, symbols = case
    raw = raw_of(torch.tensor(symbols, dtype=torch.int64))
    cursor = Cursor(raw + b"next")
    found = rans_decode(cursor, len(symbols), limit)
    assert found.tolist() == symbols
    assert found.dtype == (torch.uint8 if limit <= 256 else torch.int32)
    assert cursor.left == 4  # the stream says itself where it ends
    assert reference.rans(reference.Reader(raw), len(symbols), limit) == symbols


@every
@pytest.mark.parametrize("count", [1, 3, 1000, 20_000])
def test_python_reads_what_constriction_wrote(weights, count):
    """The frequencies are integers that both sides know exactly: one wrong of 2**24 would garble what follows."""
    symbols = drawn(weights, count)
    reader = reference.Reader(raw_of(symbols))
    assert reference.rans(reader, count, len(weights)) == symbols.tolist()
    assert reader.at == len(reader.data)


@pytest.mark.parametrize("symbol", [0, 1, MAX_SYMBOLS - 1])
@pytest.mark.parametrize("count", [1, 1000])
def test_one_symbol(symbol, count):
    raw = raw_of(torch.full((count,), symbol))
    assert len(raw) <= 10 + symbol
    assert rans_decode(Cursor(raw), count, MAX_SYMBOLS).tolist() == [symbol] * count
    assert reference.rans(reference.Reader(raw), count, MAX_SYMBOLS) == [symbol] * count


@every
def test_size_is_the_entropy(weights):
    """Within 1 % for streams of 64 KB; of 1 MB for thousands of symbols, whose table alone takes 4 to 8 KB."""
    least = 1 << 20 if len(weights) == MAX_SYMBOLS else 1 << 16
    shares = weights.double() / weights.sum()
    bits = -float((shares * shares.clamp_min(1e-300).log2()).sum())
    symbols = drawn(weights, math.ceil(8.2 * least / bits))
    assert least < entropy(symbols) <= rans_encode(symbols).numel() <= 1.01 * entropy(symbols)


def test_half_of_the_symbols_rare():
    """The rare ones get more than their share, and the common ones must make room for it."""
    symbols = torch.cat([torch.arange(2000), torch.arange(2000, 4096).repeat(2000)])
    stream = rans_encode(symbols)
    assert stream.numel() <= 1.01 * entropy(symbols)
    cursor = Cursor(bytes(stream.numpy()))
    assert torch.equal(rans_decode(cursor, symbols.numel(), MAX_SYMBOLS).long(), symbols)


def test_no_symbols_take_no_bytes():
    assert raw_of(torch.empty(0, dtype=torch.int64)) == b""
    assert rans_decode(Cursor(b""), 0, 8).shape == (0,)


def stream(precision, shares, words):
    packed = b"".join(word.to_bytes(4, "little") for word in words)
    return bytes([precision]) + varint(len(shares)) + b"".join(map(varint, shares)) + varint(len(words)) + packed


MALFORMED = {
    "empty": (b"", "ends after"),
    "precision of 21": (stream(21, [1 << 21], []), "do not add up"),
    "shares too small": (stream(6, [32, 31], []), "do not add up"),
    "shares too great": (stream(6, [32, 33], []), "do not add up"),
    "shares that wrap": (stream(6, [2**63 - 1, 2**63 - 1, 66], []), "do not add up"),
    "no shares": (stream(0, [], []), "do not add up"),
    "more shares than symbols": (stream(6, [8] * 9, []), "a list has 9 items where 8 are the most"),
    "a billion shares": (b"\6" + varint(10**9), "a list has 1000000000 items"),
    "a billion words": (b"\1\2\1\1" + varint(10**9), "ends after"),
    "last word is 0": (stream(1, [1, 1], [5, 0]), "cannot be read"),
    "a word too many": (stream(1, [1, 1], [1, 1, 1]), "do not end after"),
    "ends in another state": (stream(1, [1, 1], [1 << 30]), "do not end after"),
}


@pytest.mark.parametrize(("raw", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_streams_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        rans_decode(Cursor(raw), 3, 8)


def test_every_truncation_and_every_flipped_bit():
    """Either a sentence, or symbols that are all within the limit."""
    raw = raw_of(drawn(SOURCES["bell"][:8] + 0.1, 150))
    for size in range(len(raw)):
        with pytest.raises(ValueError, match=r"ends after|items"):
            rans_decode(Cursor(raw[:size]), 150, 8)
    for at in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[at // 8] ^= 1 << at % 8
        try:
            found = rans_decode(Cursor(bytes(damaged)), 150, 8)
        except ValueError:
            continue
        assert found.shape == (150,)
        assert int(found.max()) < 8
