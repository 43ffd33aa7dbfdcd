"""Whole pipelines: every combination of stages round-trips, here and in the second decoder, or is refused."""

import itertools
import math
from dataclasses import astuple, replace

import pytest
import torch

from dtrain.errors import InputError
from dtrain.stages import (
    HALF,
    STAGES,
    Affine,
    All,
    Bernoulli,
    BFloat16,
    Bits,
    BlockDct,
    DeadZone,
    Float16,
    Groups,
    Indexed,
    LowRank,
    Mixed,
    Packed,
    Parts,
    Payload,
    Pipeline,
    Plain,
    Rans,
    Sign,
    Stratified,
    Transposed,
    Uniform,
    Units,
    Zstd,
    decode,
    encode,
    kept_values,
    matrix_shape,
)
from tests.artifact import reference_stages as reference

TRANSFORMS = [Plain(), Transposed(), BlockDct(4), LowRank(2)]
SELECTS = [
    All(), Bernoulli(0.3, 1), Stratified(0.3, 1), Groups(4, 1, 1), Groups(50, 9, 1),
    Units(0, 1, 0.5, 1), Units(1, 1, 0.5, 1), Units(2, 4, 0.5, 3), Indexed(),
]  # fmt: skip
QUANTISERS = {  # with the greatest error of a coefficient, as a share of the greatest magnitude
    Float16(): 2**-11, BFloat16(): 2**-8, Sign(): 1, Sign(6): 1, Uniform(4): 1 / 14, Uniform(8, 6): 1 / 220,
    Uniform(13): 1 / 8000, Affine(1): 1, Affine(4): 1 / 15, Affine(8): 1 / 255, Affine(10, 3): 1 / 500,
    DeadZone(0.6, 7): 1, DeadZone(0.5, 127): 1,
}  # fmt: skip
CODES = [Packed(), Zstd(), Rans(), Parts(1), Parts(4)]
SHAPES = [(1, 23), (7,), (3, 2, 4), (), (0, 5), (5, 0), (2, 130)]
TAGS = [
    ["Plain", "BlockDct", "LowRank", "Transposed"],
    ["All", "Bernoulli", "Stratified", "Groups", "Units", "Indexed"],
    ["Float16", "BFloat16", "Sign", "Uniform", "Bits", "DeadZone", "Affine", "Mixed", "Shared"],
    ["Packed", "Zstd", "Rans", "Parts"],
]
each_transform = pytest.mark.parametrize("transform", TRANSFORMS, ids=repr)
each_select = pytest.mark.parametrize("select", SELECTS, ids=repr)


def refusal(transform, select, quantise, code):
    """The rule of FORMAT.md that forbids a combination, or None."""
    if isinstance(quantise, Bits) and not (transform == Plain() and select == All()):
        return "Bits stores every bit"
    if isinstance(quantise, Mixed) and not (transform == BlockDct(4) and select == All() and quantise.group == 16):
        return "Mixed gives bits to whole patches"
    if isinstance(select, (Groups, Units)) and isinstance(transform, (BlockDct, LowRank)):
        return "follows the rows"
    if isinstance(code, Rans) and isinstance(quantise, (Uniform, Affine)) and quantise.bits > 12:
        return "12 bits at most"
    if isinstance(code, Parts) and not (isinstance(quantise, Affine) and code.high <= quantise.bits):
        return "splits the codes of Affine"
    return None


def by_reference(payload, shape):
    pipeline = payload.pipeline
    stages = (pipeline.transform, pipeline.select, pipeline.quantise, pipeline.code)
    numbers = [(stage.tag, *astuple(stage)) for stage in stages]
    raw = bytes(payload.data.tolist())
    return reference.decode(reference.Payload(*numbers, payload.scale, raw), "w", shape)


def top(values):
    return float(values.abs().max()) if values.numel() else 0.0


def check_kept(payload, shape, count):
    """The number of kept coefficients is exact, except of a random mask, which is not drawn: there it is near."""
    select, quantise, code = payload.pipeline.select, payload.pipeline.quantise, payload.pipeline.code
    found, (least, most) = kept_values(payload, shape), select.count_bounds(payload.pipeline.transform.grid(shape))
    if isinstance(select, (All, Indexed)) or least == most:
        assert found == count
    elif isinstance(code, Packed):  # the last byte has room for up to 7 bits more: none where a value is whole bytes
        assert 0 <= (found - count) * quantise.bits * quantise.symbols_per_value <= 7
    else:
        assert least <= count <= most
        assert found == (least + most) // 2


def check(pipeline, error, shape):
    """Encode a random tensor and read it back: by dtrain, by the reference decoder, within the quantiser's error."""
    values, grid = torch.randn(shape), pipeline.transform.grid(shape)
    positions = pipeline.select.positions("w", grid) if pipeline.select != Indexed() else None
    if pipeline.select == Indexed():
        positions = (torch.rand(grid) < 0.3).view(-1).nonzero().view(-1)
    payload = encode(pipeline, "w", values, positions=positions)
    decoded, expected = decode(payload, "w", shape), by_reference(payload, shape)
    where = range(values.numel()) if decoded.positions is None else decoded.positions.tolist()
    assert list(where) == list(expected)
    # Only sums may differ, and only in the last place.
    slack = 2**-23 * top(decoded.values) if isinstance(pipeline.transform, (BlockDct, LowRank)) else 0.0
    assert decoded.values.tolist() == pytest.approx(list(expected.values()), rel=0.0, abs=slack)
    kept = slice(None) if positions is None else positions
    exact = pipeline.transform.forward(values).view(-1)
    filled = isinstance(pipeline.transform, BlockDct) and positions is None  # what fills up patches is not counted
    check_kept(payload, shape, values.numel() if filled else exact[kept].numel())
    # The same bytes without their transform are the coefficients.
    plain = decode(Payload(replace(pipeline, transform=Plain()), payload.data), "w", grid)
    found = plain.dense(exact.numel()) * payload.scale ** (1 / pipeline.transform.degree)
    assert top(found[kept] - exact[kept]) <= error * top(exact) * 1.001
    assert top(found) == top(found[kept])


@each_select
@each_transform
def test_every_combination_round_trips_or_is_refused(transform, select):
    others = [*QUANTISERS, Mixed(16, True), Mixed(4, False), Bits(4)]
    for quantise, code in itertools.product(others, CODES):
        reason = refusal(transform, select, quantise, code)
        if reason:
            with pytest.raises(InputError, match=reason):
                Pipeline(select, quantise, code, transform)
        else:
            pipeline = Pipeline(select, quantise, code, transform)
            if quantise in QUANTISERS:  # the others take more than values: see below, and test_mixed
                check(pipeline, QUANTISERS[quantise], (9, 10))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("transform", "select"),
    [pair for pair in itertools.product(TRANSFORMS, SELECTS) if not refusal(*pair, Float16(), Packed())],
    ids=repr,
)
def test_every_shape(transform, select, shape):
    if isinstance(transform, LowRank) and min(matrix_shape(shape)) < 2:
        with pytest.raises(InputError, match="Use a smaller rank"):
            encode(Pipeline(All(), Float16(), Packed(), transform), "w", torch.randn(shape))
        return
    for quantise, code in ((Float16(), Packed()), (Sign(3), Packed()), (Affine(4, 5), Parts(2)), (Uniform(4), Rans())):
        check(Pipeline(select, quantise, code, transform), QUANTISERS.get(quantise, 1), shape)


@pytest.mark.parametrize("code", [Packed(), Zstd(), Rans()], ids=repr)
@pytest.mark.parametrize("width", [1, 2, 8])
def test_bits(code, width):
    raw = torch.randint(0, 256, (15 * width,), dtype=torch.uint8)
    payload = encode(Pipeline(All(), Bits(width), code), "w", raw)
    whole = [int.from_bytes(bytes(value.tolist()), "little") for value in raw.view(15, width)]
    assert torch.equal(decode(payload, "w", (3, 5)).values, raw)
    assert list(by_reference(payload, (3, 5)).values()) == whole
    assert kept_values(payload, (3, 5)) == 15


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("code", [Packed(), Zstd(), Rans()], ids=repr)
@pytest.mark.parametrize("shape", [(9, 10), (7,), (0, 5)], ids=str)
def test_mixed(fill, code, shape):
    pipeline = Pipeline(All(), Mixed(16, fill), code, BlockDct(4))
    grid = pipeline.transform.grid(shape)
    payload = encode(pipeline, "w", torch.randn(shape), widths=torch.randint(0, 9, (grid[0],)))
    found, expected = decode(payload, "w", shape).values, by_reference(payload, shape)
    assert found.tolist() == pytest.approx(list(expected.values()), rel=0.0, abs=2**-23 * top(found))
    assert kept_values(payload, shape) == math.prod(shape)  # what fills up the patches is not counted


@each_select
def test_no_mask_is_drawn_to_count(select):
    """A shape of 2**40 elements may stand in a file of a few bytes: its mask would fill the memory."""
    for quantise, code in itertools.product(QUANTISERS, CODES):
        if not refusal(Plain(), select, quantise, code):
            payload = Payload(Pipeline(select, quantise, code), torch.tensor([7], dtype=torch.uint8))
            found, bounds = kept_values(payload, (2**20, 2**20)), select.count_bounds((2**20, 2**20))
            if isinstance(select, Indexed):
                assert found == 7  # its first byte
            elif isinstance(select, All) or not isinstance(code, Packed):
                assert found == sum(bounds) // 2
            else:
                assert 0 <= found <= 8


def test_the_scale_of_a_product_is_the_product_of_the_scales():
    """Both factors are quantised with one step: the payload's scale is its square."""
    values, pipeline = torch.randn(12, 9), Pipeline(All(), Uniform(8), Packed(), LowRank(3))
    payload = encode(pipeline, "w", values)
    assert payload.scale == pytest.approx((top(LowRank(3).forward(values)) / 127) ** 2, rel=1e-6)
    smaller = encode(pipeline, "w", values * 2.0**-20)
    assert smaller.scale == payload.scale * 2.0**-20
    assert torch.equal(smaller.data, payload.data)


@pytest.mark.parametrize("quantise", [*QUANTISERS], ids=repr)
def test_a_payload_may_start_at_any_byte(quantise):
    payload = encode(Pipeline(Bernoulli(0.5, 0), quantise), "w", torch.randn(9, 10))
    shifted = Payload(payload.pipeline, torch.cat([payload.data[:1], payload.data])[1:], payload.scale)
    assert torch.equal(decode(shifted, "w", (9, 10)).values, decode(payload, "w", (9, 10)).values)


@each_transform
def test_the_caller_may_bring_the_coefficients(transform):
    values, pipeline = torch.randn(9, 10), Pipeline(Bernoulli(0.5, 0), Uniform(4), Rans(), transform)
    both = [encode(pipeline, "w", values, coefficients=given) for given in (None, transform.forward(values))]
    assert both[0].scale == both[1].scale
    assert torch.equal(both[0].data, both[1].data)


def test_what_the_caller_chooses_must_be_given():
    with pytest.raises(InputError, match="pass positions="):
        encode(Pipeline(Indexed()), "w", torch.randn(3, 3))
    with pytest.raises(InputError, match="pass widths="):
        encode(Pipeline(All(), Mixed(4, True), Packed(), BlockDct(2)), "w", torch.randn(3, 3))


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("select", [All(), Indexed(), Groups(4, 1, 0)], ids=repr)
def test_every_truncation_and_every_byte_too_many_is_refused(select, code):
    pipeline, positions = Pipeline(select, Affine(4, 8), code), torch.tensor([1, 5, 40])
    payload = encode(pipeline, "w", torch.randn(9, 10), positions=positions)
    for size in range(payload.data.numel()):
        with pytest.raises(ValueError, match=r"ends after|expected|items|no Zstandard frame|do not fit"):
            decode(replace(payload, data=payload.data[:size]), "w", (9, 10))
    with pytest.raises(ValueError, match=r"left over|expected|no Zstandard frame"):
        decode(replace(payload, data=torch.cat([payload.data, payload.data[:1]])), "w", (9, 10))


def test_stages_have_the_numbers_they_were_born_with():
    """A file names its stages by number: append only."""
    assert [[stage.__name__ for stage in sorted(room, key=lambda stage: stage.tag)] for room in STAGES] == TAGS
    assert all(stage.tag == number for room in STAGES for number, stage in enumerate(sorted(room, key=lambda s: s.tag)))
    assert Pipeline(All(), Float16(), Packed(), Plain()) == HALF
