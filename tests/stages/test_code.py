"""Symbols and bytes: packing against big integers, and coders that lose nothing and cannot be fooled."""

import math

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import All, Bernoulli, Float16, Packed, Parts, Payload, Pipeline, Rans, Sign, Zstd, decode
from dtrain.stages.bits import pack_bits, packed_size, unpack_bits
from dtrain.stages.cursor import Cursor
from dtrain.stages.rans import rans_encode
from tests.artifact import reference_stages as reference

PARTS = [(k, high) for k in range(1, 17) for high in range(1, min(k, 8) + 1)]


def codes_below(bits):
    return st.lists(st.integers(0, 2**bits - 1), max_size=70)


def coded(code, symbols, bits):
    """The bytes of symbols, after checking that they come back."""
    raw = bytes(code.encode(torch.as_tensor(symbols), bits).tolist())
    cursor = Cursor(raw)
    found = code.decode(cursor, bits, len(symbols))
    assert cursor.left == 0
    assert found.dtype == (torch.uint8 if bits <= 8 else torch.int32)
    assert torch.equal(found.long(), torch.as_tensor(symbols).long())
    return raw


@given(st.integers(1, 16).flatmap(lambda k: st.tuples(st.just(k), codes_below(k))))
def test_packing_is_one_little_endian_number(case):
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(len(codes), bits), "little")
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@given(st.integers(1, 16).flatmap(lambda k: st.tuples(st.just(k), codes_below(k))))
def test_all_codes_agree(case):
    bits, symbols = case
    values = torch.tensor(symbols, dtype=torch.int64)
    codes = [Packed(), Zstd(), *([Rans()] if bits <= 12 else []), Parts(1), Parts(min(bits, 8))]
    for code in codes:
        raw = coded(code, values, bits)
        parameters = (code.high,) if isinstance(code, Parts) else ()
        reader = reference.Reader(raw)
        assert reference.coded((code.tag, *parameters), reader, bits, len(symbols)) == symbols
        assert reader.at == len(raw)


@pytest.mark.parametrize(("bits", "high"), PARTS)
def test_parts_take_their_identity_and_the_lower_bits(bits, high):
    """Nothing is won by the split but what the entropy coder wins on the upper bits."""
    symbols = (torch.randn(20_000).abs() * 2**bits / 4).long().clamp_max(2**bits - 1)
    low, part = bits - high, symbols >> (bits - high)
    members = torch.bincount(part, minlength=1 << high)
    size = len(coded(Parts(high), symbols, bits))
    assert size == rans_encode(part).numel() + sum(packed_size(count, low) for count in members.tolist())
    shares = members[members > 0].double() / 20_000
    identity = -float((shares * shares.log2()).sum()) * 20_000 / 8
    table = 3 * (1 << high) + 8
    assert identity <= size - 20_000 * low / 8 <= 1.01 * identity + table + (1 << high)


def test_the_entropy_coders_gain_what_they_promise():
    symbols = torch.multinomial(torch.tensor([0.9, 0.05, 0.03, 0.02]), 20_000, replacement=True)
    entropy = 20_000 / 8 * -sum(p * math.log2(p) for p in (0.9, 0.05, 0.03, 0.02))
    assert len(coded(Packed(), symbols, 2)) == 5000
    assert len(coded(Rans(), symbols, 2)) < 1.05 * entropy
    assert len(coded(Rans(), symbols, 2)) < len(coded(Parts(1), symbols, 2)) < 5000
    assert len(coded(Zstd(), symbols, 2)) < 5000


def test_a_frame_has_a_block_for_every_piece():
    parts = [
        torch.zeros(5000),
        torch.randint(4, (5000,)),
        torch.randint(100, 104, (5000,)),
        torch.randint(256, (5000,)),
    ]
    symbols = torch.cat(parts).to(torch.uint8)
    frame = Zstd().encode(symbols, 8, pieces=4)
    assert Zstd().decode(Cursor(bytes(frame.tolist())), 8, 20_000).equal(symbols)
    uniform, four_symbols, header = 5000, 5000 / 4, 100  # in bytes; zeros take none
    assert frame.numel() < uniform + 2 * four_symbols + 2 * header
    assert frame.numel() < 0.9 * Zstd().encode(symbols, 8).numel()


@pytest.mark.parametrize("code", [Packed(), Rans(), Parts(2)], ids=repr)
def test_what_ends_itself_leaves_the_rest(code):
    raw = bytes(code.encode(torch.arange(8), 3).tolist())
    cursor = Cursor(raw + b"next")
    assert code.decode(cursor, 3, 8).tolist() == list(range(8))
    assert cursor.left == 4


@pytest.mark.parametrize("size", range(8))
def test_cut_parts_are_refused(size):
    raw = bytes(Parts(1).encode(torch.tensor([0, 1, 2, 3, 0, 1]), 2).tolist())
    with pytest.raises(ValueError, match=r"ends after|items"):
        Parts(1).decode(Cursor(raw[: len(raw) - 1 - size]), 2, 6)


def test_filled_parts_are_refused():
    raw = Parts(1).encode(torch.tensor([0, 1, 2, 3, 0, 1]), 2)
    raw[-1] |= 0x80
    with pytest.raises(ValueError, match="not filled with zeros"):
        Parts(1).decode(Cursor(bytes(raw.tolist())), 2, 6)


@pytest.mark.parametrize(("pipeline", "size"), [(Pipeline(All(), Float16()), 21), (Pipeline(All(), Sign()), 3)])
def test_payloads_of_the_wrong_size_are_refused(pipeline, size):
    with pytest.raises(ValueError, match="expected"):
        decode(Payload(pipeline, torch.zeros(size, dtype=torch.uint8)), "w", (10,))


def test_an_impossible_count_is_refused_before_the_mask_is_drawn():
    payload = Payload(Pipeline(Bernoulli(0.5, 0), Float16()), torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected"):
        decode(payload, "w", (1 << 40,))


CONTENT = b"delta" * 40
FRAME = zstandard.ZstdCompressor(level=3).compress(CONTENT)
UNSIZED = zstandard.ZstdCompressor(write_content_size=False).compress(CONTENT)


def resized(frame, size):
    """The frame with another size in the one byte that states it (RFC 8878, 3.1.1.1.4)."""
    assert frame[4] & 0xE0 == 0x20
    return frame[:5] + bytes([size]) + frame[6:]


FRAMES = {
    "shorter than stated": (resized(FRAME, 201), 201),
    "longer than stated": (resized(FRAME, 10), 10),
    "another size than wanted": (FRAME, 199),
    "no stated size": (UNSIZED, 200),
    "bomb": (zstandard.ZstdCompressor().compress(bytes(1 << 24)), 200),
    "no frame": (b"not zstd" * 3, 200),
    "empty": (b"", 200),
    "empty for nothing": (b"", 0),
    "cut": (FRAME[:-1], 200),
    "head only": (FRAME[:6], 200),
    "bytes behind it": (FRAME + b"hidden", 200),
    "two frames": (FRAME + FRAME, 200),
    "damaged": (FRAME[:9] + bytes([FRAME[9] ^ 0xFF]) + FRAME[10:], 200),
}


@pytest.mark.parametrize(("frame", "size"), FRAMES.values(), ids=FRAMES.keys())
def test_zstd_refuses_what_is_not_exactly_one_frame_of_that_size(frame, size):
    with pytest.raises(ValueError):  # noqa: PT011 - any sentence will do
        Zstd().decode(Cursor(frame), 8, size)


@pytest.mark.parametrize("high", [0, 9])
def test_bad_parameters_are_refused(high):
    with pytest.raises(InputError, match="must be"):
        Parts(high)
