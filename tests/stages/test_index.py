"""Stored positions: what goes in comes out, at the entropy, and damaged streams never lead outside the tensor."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.stages import Bernoulli, Indexed
from dtrain.stages.bits import pack_bits
from dtrain.stages.cursor import Cursor, varint
from dtrain.stages.rans import rans_encode
from tests.artifact import reference_stages as reference


def raw_of(positions):
    return bytes(Indexed().encode(torch.as_tensor(positions, dtype=torch.int64)).tolist())


@given(
    st.sampled_from([1, 70, 5000, 1 << 20, 1 << 47]).flatmap(
        lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1)))
    )
)
def test_round_trip(case):
    numel, chosen = case
    positions = sorted(chosen)
    raw = raw_of(positions)
    cursor = Cursor(raw + b"next")
    found = Indexed().read(cursor, numel)
    assert found.dtype == torch.int64
    assert found.tolist() == positions
    assert cursor.left == 4  # the stream says itself where it ends
    assert reference.index(reference.Reader(raw), numel) == positions


@pytest.mark.parametrize(
    "positions",
    [range(1000), range(0, 64_000, 64), range(999, 64_000, 64), [0, 63, 126, 127, 10**6], [10**6 - 1], [0]],
    ids=["all", "every 64th", "late", "escapes", "last", "first"],
)
def test_patterns(positions):
    raw = raw_of(list(positions))
    assert Indexed().read(Cursor(raw), 10**6 + 1).tolist() == list(positions)
    assert reference.index(reference.Reader(raw), 10**6 + 1) == list(positions)


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.25, 0.1, 0.03, 0.01, 1e-3, 1e-5])
def test_size_is_the_entropy(keep):
    """Random positions cost n H(k / n) bits: within 1 % for streams of 64 KB and more."""
    numel = math.ceil(8 * 66_000 / binary_entropy(keep))
    positions = Bernoulli(keep, 0).positions("w", (1, numel))
    size = Indexed().encode(positions).numel()
    entropy = numel * binary_entropy(positions.numel() / numel) / 8
    assert size >= 1 << 16
    assert 0.999 * entropy < size < 1.01 * entropy


def binary_entropy(p):
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def crafted(count, low, length, rest=b"", symbols=()):
    return varint(count) + bytes([low]) + varint(length) + rest + bytes(rans_encode(torch.tensor(symbols)).tolist())


MALFORMED = {
    "empty": (b"", "ends after"),
    "count only": (b"\3", "ends after"),
    "more positions than elements": (crafted(101, 0, 101, symbols=[0] * 101), "do not fit"),
    "a great many positions": (varint(2**62) + b"\0" + varint(2**62), "do not fit"),
    "fewer symbols than positions": (crafted(3, 0, 2, symbols=[0, 0]), "do not fit"),
    "a great many symbols": (varint(3) + b"\0" + varint(2**62), "do not fit"),
    "two symbols too many": (crafted(3, 0, 5, symbols=[63, 63, 0, 0, 0]), "do not fit"),
    "49 low bits": (crafted(1, 49, 1, bytes(7), [0]), "do not fit"),
    "escape at the end": (crafted(2, 0, 2, symbols=[0, 63]), "end 1 positions where 2"),
    "escape behind the last": (crafted(1, 0, 2, symbols=[0, 63]), "end 1 positions where 1"),
    "too few positions": (crafted(2, 0, 3, symbols=[0, 63, 63]), "1 positions where 2"),
    "too many positions": (crafted(2, 0, 3, symbols=[0, 0, 0]), "3 positions where 2"),
    "just outside": (crafted(2, 0, 3, symbols=[63, 36, 0]), "lies outside"),
    "far outside": (crafted(1, 48, 1, bytes(6), [62]), "lies outside"),
    "low bits outside": (crafted(1, 8, 1, b"\xff", [0]), "lies outside"),
    "low bits missing": (varint(9) + b"\x10" + varint(9) + bytes(17), "ends after"),
}


@pytest.mark.parametrize(("raw", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_streams_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        Indexed().read(Cursor(raw), 100)


def test_the_last_element_is_not_outside():
    assert Indexed().read(Cursor(crafted(2, 0, 3, symbols=[63, 35, 0])), 100).tolist() == [98, 99]


def test_distances_that_wrap_around_are_refused():
    """70,000 distances below 2**48 that add up to 2**64 and a little: in 64 bits the last position seems to fit."""
    count, numel = 70_000, 10**6
    each, more = divmod(2**64 + numel // 2 - count, count)
    rest = torch.full((count,), each, dtype=torch.int64)
    rest[:more] += 1
    planes = [bytes(pack_bits(rest >> at & 0xFFFF, 16).tolist()) for at in (0, 16, 32)]
    assert int((rest + 1).sum()) == numel // 2
    with pytest.raises(ValueError, match="lies outside"):
        Indexed().read(Cursor(crafted(count, 48, count, b"".join(planes), [0] * count)), numel)


def test_one_distance_that_wraps_around_is_refused():
    """2**16 << 48 is 0 in 64 bits."""
    symbols = [63] * 1040 + [16]
    with pytest.raises(ValueError, match="lies outside"):
        Indexed().read(Cursor(crafted(1, 48, len(symbols), bytes(6), symbols)), 10**6)


@pytest.mark.parametrize(("numel", "keep"), [(200, 0.5), (4000, 0.02), (1 << 28, 2.0**-24)])
def test_every_truncation_and_every_flipped_bit(numel, keep):
    """Either a sentence, or a selection that is ascending and inside the tensor."""
    raw = raw_of(Bernoulli(keep, 0).positions("w", (1, numel)))
    for size in range(len(raw)):
        with pytest.raises(ValueError, match=r"ends after|items|do not fit"):
            Indexed().read(Cursor(raw[:size]), numel)
    for at in range(8 * len(raw)):
        damaged = bytearray(raw)
        damaged[at // 8] ^= 1 << at % 8
        try:
            found = Indexed().read(Cursor(bytes(damaged)), numel)
        except ValueError:
            continue
        assert bool((found.diff() > 0).all())
        assert found.numel() == 0 or 0 <= int(found[0]) <= int(found[-1]) < numel
