"""Values and symbols: the error every format promises, against slow oracles written from its formula."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import (
    Affine,
    All,
    Bernoulli,
    BFloat16,
    Bits,
    DeadZone,
    Float16,
    Mixed,
    Payload,
    Pipeline,
    Sign,
    Uniform,
    decode,
    encode,
    value_format,
)
from dtrain.stages.quantise import VALUES, blocks
from tests.artifact import reference_stages as reference

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32).filter(lambda x: not x or abs(x) > 1e-30)
HALF = 2.0**-11
LATTICES = [Uniform(2), Uniform(4), Uniform(7, 16), Uniform(8, 5), Affine(1), Affine(4), Affine(3, 16), Affine(8, 5)]
GROUPED = [Sign(8), Sign(5), Uniform(4, 8), Affine(4, 8), Affine(3, 7)]


def run(quantise, values, positions=None, numel=None):
    """Return what is coded of values, and the values that are read back."""
    parts = blocks(quantise.group, len(values) if numel is None else numel, positions)
    coded = quantise.encode(values, parts)
    assert coded.side.numel() == quantise.side_bytes(parts.number)
    assert coded.side.dtype == torch.uint8
    assert coded.symbols.numel() == len(values) * quantise.symbols_per_value
    assert coded.symbols.numel() == 0 or 0 <= int(coded.symbols.min()) <= int(coded.symbols.max()) < 1 << quantise.bits
    return coded, quantise.decode(coded.side, coded.symbols, parts).double() * coded.scale


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-30, 1e30])
@pytest.mark.parametrize(("quantise", "error"), [(Float16(), HALF), (BFloat16(), 2**-8)])
def test_float_error_is_relative(quantise, error, scale):
    """Over 28 binary orders below the greatest magnitude; whatever the size of the delta."""
    values = torch.exp2(-27 * torch.rand(4000)) * torch.randn(4000).sign()
    values[0] = 1.9999  # just below a power of two: the greatest that half precision has to hold
    values = (values.double() * scale).float()
    coded, found = run(quantise, values)
    assert float(((found - values) / values).abs().max()) <= error * (1 + 1e-6)
    assert math.frexp(coded.scale)[0] == 0.5  # a power of two: the scale costs no precision


@pytest.mark.parametrize("quantise", [Float16(), BFloat16()])
@pytest.mark.parametrize("greatest", [3.3e38, 1e-38, 1e-45, 0.0])
def test_float_formats_at_the_ends_of_float32(quantise, greatest):
    values = torch.tensor([greatest, -greatest, 0.0])
    _, found = run(quantise, values)
    assert bool(torch.isfinite(found).all())
    assert torch.allclose(found.float(), values, rtol=2**-8, atol=1e-40)


def test_sign():
    coded, found = run(Sign(), torch.tensor([0.5, -1.5, 3.0, -1.0, 0.25]))
    assert coded.symbols.tolist() == [1, 0, 1, 0, 1]
    assert coded.scale == 1.25  # the mean magnitude: the least-squares scale
    assert found.tolist() == [1.25, -1.25, 1.25, -1.25, 1.25]


@given(st.integers(2, 16), st.lists(FLOATS, max_size=40))
def test_uniform_error_is_half_a_step(bits, numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    coded, found = run(Uniform(bits), values)
    assert bool(((found - values.double()).abs() <= coded.scale / 2 * (1 + 2**-7 / bits)).all())
    assert bool((found[values == 0] == 0).all())


@pytest.mark.parametrize("bits", range(2, 17))
def test_uniform_step_is_the_range_over_the_codes(bits):
    coded, found = run(Uniform(bits), torch.tensor([-3.0, 3.0]))
    assert coded.scale == pytest.approx(3 / (2 ** (bits - 1) - 1), rel=1e-7)
    assert found.tolist() == pytest.approx([-3.0, 3.0], rel=1e-6)


@given(st.integers(1, 16), st.lists(FLOATS, max_size=40))
def test_affine_error_is_half_a_step(bits, numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    coded, found = run(Affine(bits), values)
    span = max([0.0, *numbers]) - min([0.0, *numbers])
    assert coded.scale == pytest.approx(span / (2**bits - 1) or 1.0, rel=1e-6)
    assert bool(((found - values.double()).abs() <= coded.scale / 2 * (1 + 2**-7 / bits)).all())
    assert bool((found[values == 0] == 0).all())


@pytest.mark.parametrize(
    ("numbers", "zero"), [([0.0, 3.0], 0), ([5.0, 15.0], 0), ([-15.0, -5.0], 15), ([-5.0, 10.0], 5), ([0.0], 0)]
)
def test_affine_range_holds_zero(numbers, zero):
    coded, found = run(Affine(4), torch.tensor(numbers))
    assert coded.side.tolist() == [zero]
    assert found.tolist() == pytest.approx(numbers)


def lattice(quantise, side, scale, block, number):
    """Every level of a block, from the side information."""
    reader = reference.Reader(bytes(side.tolist()))
    step = reader.halves(number)[block] if quantise.group else 1.0
    if isinstance(quantise, Uniform):
        return [scale * step * code for code in range(-quantise.top, quantise.top + 1)]
    zero = reference.packed(reader, quantise.bits, number)[block]
    return [scale * step * (code - zero) for code in range(1 << quantise.bits)]


@pytest.mark.parametrize("quantise", LATTICES, ids=repr)
@pytest.mark.parametrize("shift", [0.0, 2.0, -2.0])
def test_every_value_goes_to_the_nearest_level(quantise, shift):
    values = torch.randn(83) + shift
    values[16:32] *= 1e-3
    coded, found = run(quantise, values)
    number = -(-83 // quantise.group) if quantise.group else 1
    for i in range(83):
        levels = lattice(quantise, coded.side, coded.scale, i // quantise.group if quantise.group else 0, number)
        # float32 may go to either side of a tie, and of Affine's end, where `zero` was rounded.
        least = min(abs(level - float(values[i])) for level in levels)
        assert abs(float(found[i]) - float(values[i])) <= least * (1 + 1e-4) + 1e-6, i


@pytest.mark.parametrize("quantise", GROUPED, ids=repr)
def test_blocks_are_scaled_on_their_own(quantise):
    """A block a thousand times smaller keeps its precision, and a block's scale is its own to half precision."""
    values = torch.randn(40)
    values[quantise.group : 2 * quantise.group] *= 1e-3
    _, found = run(quantise, values)
    for start in range(0, 40, quantise.group):
        block, back = values[start : start + quantise.group].double(), found[start : start + quantise.group]
        if isinstance(quantise, Sign):
            assert torch.allclose(back, block.sign() * block.abs().mean(), rtol=HALF * (1 + 1e-6))
            continue
        low, high = min(0.0, float(block.min())), max(0.0, float(block.max()))
        symmetric = isinstance(quantise, Uniform)
        step = max(high, -low) / quantise.top if symmetric else (high - low) / (2**quantise.bits - 1)
        # Half a step, and what rounding the step to half precision moves the last level.
        assert float((back - block).abs().max()) <= step / 2 * 1.001 + HALF * (high - low)


@pytest.mark.parametrize("quantise", GROUPED, ids=repr)
def test_blocks_are_runs_of_coefficients_kept_or_not(quantise):
    """Each block of a masked tensor codes as it would alone; one that keeps nothing does no harm."""
    positions = Bernoulli(0.4, 3).positions("w", (1, 60))
    positions = positions[(positions < quantise.group) | (positions >= 2 * quantise.group)]
    values = torch.randn(60)[positions]
    _, found = run(quantise, values, positions, 60)
    for block in range(-(-60 // quantise.group)):
        inside = positions // quantise.group == block
        _, alone = run(quantise, values[inside], positions[inside] % quantise.group, quantise.group)
        assert torch.allclose(found[inside], alone, rtol=2 * HALF)


@pytest.mark.parametrize("zone", [0.3, 0.5, 0.6, 1.0, 1.4, 2.0])
@pytest.mark.parametrize("top", [1, 3, 127])
def test_dead_zone(zone, top):
    """Against the formula: level floor(|v| + 1 - zone), each level worth the mean magnitude of what falls into it."""
    values = (3 * torch.randn(500)).tolist()
    values = torch.tensor([v for v in values if abs((abs(v) - zone) % 1 - 0.5) < 0.499])  # no ties of float32
    coded, found = run(DeadZone(zone, top), values)
    levels = [max(0, min(top, math.floor(abs(v) + 1 - zone))) for v in values.tolist()]
    means = [
        math.fsum(inside) / len(inside) if (inside := same_level(values, levels, level)) else 0.0
        for level in range(top + 1)
    ]
    expected = [
        math.copysign(means[level], v) if level else 0.0 for level, v in zip(levels, values.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=HALF * (1 + 1e-6))
    assert bool((found[values.abs() < zone] == 0).all())
    assert coded.symbols.tolist() == [
        top + round(math.copysign(level, v)) for level, v in zip(levels, values.tolist(), strict=True)
    ]


def same_level(values, levels, level):
    return [abs(v) for v, found in zip(values.tolist(), levels, strict=True) if found == level]


@given(st.sampled_from([1, 2, 4, 8, 16]), st.integers(0, 40), st.randoms(use_true_random=False))
def test_bits_are_byte_planes(width, count, random):
    raw = random.randbytes(width * count)
    coded = Bits(width).encode(torch.tensor(list(raw), dtype=torch.uint8), blocks(0, count, None))
    assert coded.scale == 1.0
    assert bytes(coded.symbols.tolist()) == b"".join(raw[plane::width] for plane in range(width))
    assert bytes(Bits(width).decode(coded.side, coded.symbols, blocks(0, count, None)).tolist()) == raw


@pytest.mark.parametrize("quantise", [*VALUES.values(), *LATTICES, *GROUPED, DeadZone(0.6, 5)], ids=repr)
@pytest.mark.parametrize("numbers", [[], [0.0], [0.0] * 9, [1e-45, 0.0], [1e38, -1e38], [1e-20, 1e18]], ids=repr)
def test_extremes_stay_finite_and_zero_stays_zero(quantise, numbers):
    _, found = run(quantise, torch.tensor(numbers))
    assert bool(torch.isfinite(found).all())
    if not any(numbers):
        assert found.tolist() == [0.0] * len(numbers)


def test_scales_are_float32_at_once():
    payload = Payload(Pipeline(All(), Sign()), torch.zeros(1, dtype=torch.uint8), 0.1)
    assert payload.scale == float(torch.tensor(0.1))


@pytest.mark.parametrize("scale", [1e39, -math.inf, math.nan])
def test_scales_beyond_float32_are_refused(scale):
    with pytest.raises(InputError, match="does not fit float32"):
        Payload(Pipeline(All(), Sign()), torch.zeros(1, dtype=torch.uint8), scale)


@pytest.mark.parametrize("quantise", [Sign(), Uniform(4), Uniform(3), Affine(3), Sign(4), Affine(5, 4)], ids=repr)
def test_the_last_byte_is_filled_with_zeros(quantise):
    """FORMAT.md: a reader refuses whatever differs."""
    payload = encode(Pipeline(All(), quantise), "w", torch.randn(9))
    payload.data[-1] |= 0x80
    with pytest.raises(ValueError, match="not filled with zeros"):
        decode(payload, "w", (9,))


def test_a_symbol_beyond_the_levels_is_refused():
    payload = encode(Pipeline(All(), DeadZone(0.5, 2)), "w", torch.randn(8))
    payload.data[-3:] = 0xFF
    with pytest.raises(ValueError, match="symbol 7 where 4 is the greatest"):
        decode(payload, "w", (8,))


@pytest.mark.parametrize(
    "call",
    [
        lambda: Uniform(1),
        lambda: Uniform(17),
        lambda: Affine(0),
        lambda: Affine(17),
        lambda: DeadZone(0, 3),
        lambda: DeadZone(2.1, 3),
        lambda: DeadZone(math.nan, 3),
        lambda: DeadZone(0.5, 0),
        lambda: DeadZone(0.5, 128),
        lambda: Mixed(0, True),
        lambda: Bits(3),
        lambda: value_format("int8"),
    ],
)
def test_bad_parameters_are_refused(call):
    with pytest.raises(InputError, match="must be"):
        call()
