"""Values and bytes: packing against big integers, the error every format promises, coders that cannot be fooled."""

import math

import pytest
import torch
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import BFloat16, Bits, Float16, Packed, Payload, Pipeline, Sign, Uniform, Zstd, decode, encode
from dtrain.stages.bits import pack_bits, packed_size, unpack_bits
from dtrain.stages.quantise import VALUES, value_format
from dtrain.stages.select import All, Bernoulli
from tests.artifact import reference_decoder as reference

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: not x or abs(x) > 1e-30)


@given(st.integers(1, 16).flatmap(lambda k: st.tuples(st.just(k), st.lists(st.integers(0, 2**k - 1), max_size=70))))
def test_packing_is_one_little_endian_number(case):
    bits, codes = case
    packed = pack_bits(torch.tensor(codes, dtype=torch.int64), bits)
    number = sum(code << (i * bits) for i, code in enumerate(codes))
    assert bytes(packed.tolist()) == number.to_bytes(packed_size(len(codes), bits), "little")
    assert unpack_bits(packed, bits, len(codes)).tolist() == codes


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-30, 1e30])
@pytest.mark.parametrize(("quantise", "error"), [(Float16(), 2**-11), (BFloat16(), 2**-8)])
def test_float_error_is_relative(quantise, error, scale):
    """Over 28 binary orders below the greatest magnitude; whatever the size of the delta."""
    values = torch.exp2(-28 * torch.rand(4000)) * torch.randn(4000).sign()
    values[0] = 1.0
    values = values.double() * scale
    values = values.float()
    data, unit = quantise.encode(values)
    found = quantise.decode(data, 4000).double() * unit
    assert float(((found - values) / values).abs().max()) <= error * (1 + 1e-6)
    assert math.frexp(unit)[0] == 0.5  # a power of two: the scale costs no precision


@pytest.mark.parametrize("quantise", [Float16(), BFloat16()])
@pytest.mark.parametrize("greatest", [3.3e38, 1e-38, 1e-45, 0.0])
def test_float_formats_at_the_ends_of_float32(quantise, greatest):
    values = torch.tensor([greatest, -greatest, 0.0])
    data, unit = quantise.encode(values)
    found = quantise.decode(data, 3) * unit
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(found, values, rtol=2**-8, atol=1e-40)


def test_sign():
    values = torch.tensor([0.5, -1.5, 3.0, -1.0, 0.25])
    data, scale = Sign().encode(values)
    assert data.tolist() == [0b10101]
    assert scale == 1.25  # the mean magnitude: the least-squares scale
    assert Sign().decode(data, 5).tolist() == [1, -1, 1, -1, 1]


@given(st.integers(2, 16), st.lists(FLOATS, max_size=40))
def test_uniform_error_is_half_a_step(bits, numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    data, step = Uniform(bits).encode(values)
    found = Uniform(bits).decode(data, len(numbers)).double() * step
    assert data.numel() == packed_size(len(numbers), bits)
    assert bool(((found - values.double()).abs() <= step / 2 * (1 + 2**-7 / bits)).all())
    assert bool((found[values == 0] == 0).all())


@pytest.mark.parametrize("bits", range(2, 17))
def test_uniform_step_is_the_range_over_the_codes(bits):
    data, step = Uniform(bits).encode(torch.tensor([-3.0, 3.0]))
    top = 2 ** (bits - 1) - 1
    assert step == pytest.approx(3 / top, rel=1e-7)
    assert Uniform(bits).decode(data, 2).tolist() == [-top, top]


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 40), st.randoms(use_true_random=False))
def test_bits_are_byte_planes(width, count, random):
    raw = random.randbytes(width * count)
    data, scale = Bits(width).encode(torch.tensor(list(raw), dtype=torch.uint8))
    assert scale == 1.0
    assert bytes(data.tolist()) == b"".join(raw[plane::width] for plane in range(width))
    assert bytes(Bits(width).decode(data, count).tolist()) == raw


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 1000])
def test_formats_decode_as_the_reference_does(name, count):
    quantise = value_format(name)
    payload = encode(Pipeline(All(), quantise), "w", torch.randn(count))
    assert payload.data.numel() == quantise.size(count)
    parameters = (quantise.bits,) if isinstance(quantise, Uniform) else ()
    raw = bytes(payload.data.tolist())
    expected = reference.values(reference.Payload((0,), (quantise.tag, *parameters), (0,), 1.0, raw), count)
    assert decode(payload, "w", (count,)).values.tolist() == expected


def test_scales_are_float32_at_once():
    payload = Payload(Pipeline(All(), Sign()), torch.zeros(1, dtype=torch.uint8), 0.1)
    assert payload.scale == float(torch.tensor(0.1))


@pytest.mark.parametrize(("pipeline", "size"), [(Pipeline(All(), Float16()), 21), (Pipeline(All(), Sign()), 3)])
def test_payloads_of_the_wrong_size_are_refused(pipeline, size):
    with pytest.raises(ValueError, match="expected"):
        decode(Payload(pipeline, torch.zeros(size, dtype=torch.uint8)), "w", (10,))


def test_an_impossible_count_is_refused_before_the_mask_is_drawn():
    payload = Payload(Pipeline(Bernoulli(0.5, 0), Float16()), torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected"):
        decode(payload, "w", (1 << 40,))


@pytest.mark.parametrize("quantise", [Sign(), Uniform(4), Uniform(3)])
def test_the_last_byte_is_filled_with_zeros(quantise):
    """FORMAT.md: a reader refuses whatever differs."""
    payload = encode(Pipeline(All(), quantise), "w", torch.randn(9))
    payload.data[-1] |= 0x80
    with pytest.raises(ValueError):  # noqa: PT011 - any sentence will do
        decode(payload, "w", (9,))


@given(st.binary(max_size=2000))
def test_coders_round_trip(raw):
    data = torch.tensor(list(raw), dtype=torch.uint8)
    for code in (Packed(), Zstd()):
        assert bytes(code.decode(code.encode(data), len(raw)).tolist()) == raw


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
    data = torch.tensor(list(frame), dtype=torch.uint8)
    with pytest.raises(ValueError):  # noqa: PT011 - any sentence will do
        Zstd().decode(data, size)


@pytest.mark.parametrize(
    "call", [lambda: Uniform(1), lambda: Uniform(17), lambda: Bits(3), lambda: value_format("int8")]
)
def test_bad_parameters_are_refused(call):
    with pytest.raises(InputError, match="must be"):
        call()
