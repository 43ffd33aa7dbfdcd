"""Mixed precision: every block has the bits it was given, and pays for no more."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import All, BlockDct, Mixed, Packed, Payload, Pipeline, Rans, Zstd, decode, encode
from dtrain.stages.bits import packed_size
from dtrain.stages.quantise import blocks
from dtrain.stages.rans import rans_encode
from tests.artifact import reference_stages as reference

GROUP, HALF = 16, 2.0**-11


def run(values, widths, fill):
    """Return what is coded of (blocks, GROUP) values, and the values that are read back."""
    mixed, widths = Mixed(GROUP, fill), torch.as_tensor(widths, dtype=torch.int64)
    parts = blocks(GROUP, values.numel(), None)
    coded = mixed.encode(values.reshape(-1), parts, widths)
    side = torch.cat([widths.to(torch.uint8), coded.side[rans_encode(widths).numel() :]])
    assert mixed.symbol_count(side, parts) == coded.symbols.numel()
    return coded, mixed.decode(side, coded.symbols, parts).view(-1, GROUP) * coded.scale


def levels(coded, widths):
    """Every level of every block of more than no bits, from the side information."""
    reader = reference.Reader(bytes(coded.side[rans_encode(torch.tensor(widths)).numel() :].tolist()))
    lows, steps = reader.halves(len(widths)), reader.halves(len(widths))
    return [
        [coded.scale * (low + step * code) for code in range(1 << bits)]
        for low, step, bits in zip(lows, steps, widths, strict=True)
    ]


@pytest.mark.parametrize("shift", [0.0, 3.0, -40.0])
def test_every_value_goes_to_the_nearest_level(shift):
    """Of the levels as they will be read: half precision moves them by more than a step where a block lies far off."""
    widths = [1, 2, 3, 5, 8] * 4
    values = torch.randn(20, GROUP) + shift
    coded, found = run(values, widths, fill=False)
    for block, back, known in zip(values.tolist(), found.tolist(), levels(coded, widths), strict=True):
        for value, decoded in zip(block, back, strict=True):
            assert abs(decoded - value) <= min(abs(level - value) for level in known) + 1e-5 * (1 + abs(shift))


@given(st.lists(st.integers(0, 8), min_size=1, max_size=30), st.booleans(), st.floats(-2, 2))
def test_error_is_half_a_step_of_the_blocks_own_bits(widths, fill, shift):
    """Min-max: step = (high - low) / (2**bits - 1); low and step are stored in half precision."""
    values = torch.randn(len(widths), GROUP) + shift
    _, found = run(values, widths, fill)
    for block, back, bits in zip(values, found, widths, strict=True):
        if not bits:
            assert back[1:].tolist() == [0.0] * (GROUP - 1)
            assert float(back[0]) == pytest.approx(float(block[0]) if fill else 0.0, rel=HALF * 1.001)
            continue
        low, high = float(block.min()), float(block.max())
        bound = (high - low) / (2**bits - 1) / 2 + HALF * (abs(low) + high - low)
        assert float((back - block).abs().max()) <= bound * 1.001
        assert back.unique().numel() <= 2**bits


@given(st.lists(st.integers(0, 8), max_size=30), st.booleans())
def test_size_is_what_the_widths_say(widths, fill):
    coded, _ = run(torch.randn(len(widths), GROUP), widths, fill)
    fine = sum(bits > 0 for bits in widths)
    stream = rans_encode(torch.tensor(widths, dtype=torch.int64)).numel()
    assert coded.side.numel() == stream + 2 * (fine + (len(widths) if fill else fine))
    assert coded.symbols.numel() == sum(packed_size(widths.count(bits) * GROUP, bits) for bits in range(1, 9))


@pytest.mark.parametrize("bits", [1, 8])
def test_a_constant_block_has_no_step(bits):
    values = torch.tensor([[0.5], [-3.0], [0.0]]).expand(3, GROUP)
    assert torch.equal(run(values, [bits] * 3, fill=False)[1], values)


def test_every_further_bit_helps():
    """From one on: one bit of a bell-shaped block, all of it at its ends, is worse than none."""
    values = torch.randn(50, GROUP)
    errors = [float((run(values, [bits] * 50, fill=True)[1] - values).square().sum()) for bits in range(1, 9)]
    assert all(after < before / 2 for before, after in pairwise(errors))


@pytest.mark.parametrize("code", [Packed(), Zstd(), Rans()], ids=repr)
@pytest.mark.parametrize("shape", [(13, 22), (1, 9), (0, 5)], ids=str)
def test_in_a_pipeline(code, shape):
    """Eight bits a patch come close; a sentence where the widths are missing."""
    values, pipeline = torch.randn(shape), Pipeline(All(), Mixed(64, True), code, BlockDct(8))
    number = pipeline.transform.grid(shape)[0]
    payload = encode(pipeline, "w", values, widths=torch.full((number,), 8))
    found = decode(payload, "w", shape).values * payload.scale
    assert torch.allclose(found, values.view(-1), atol=0.05)
    with pytest.raises(InputError, match="pass widths="):
        encode(pipeline, "w", values)


def test_without_bits_a_patch_is_its_mean():
    values = torch.randn(16, 24)
    payload = encode(Pipeline(All(), Mixed(64, True), Packed(), BlockDct(8)), "w", values, widths=torch.zeros(6).long())
    found = (decode(payload, "w", (16, 24)).values * payload.scale).view(2, 8, 3, 8)
    means = values.view(2, 8, 3, 8).mean((1, 3), keepdim=True)
    assert torch.allclose(found, means.expand(2, 8, 3, 8), rtol=HALF * 1.001)


def test_every_truncation_is_refused():
    pipeline = Pipeline(All(), Mixed(16, True), Packed(), BlockDct(4))
    payload = encode(pipeline, "w", torch.randn(8, 8), widths=torch.tensor([0, 1, 3, 8]))
    for size in range(payload.data.numel()):
        with pytest.raises(ValueError, match=r"ends after|items"):
            decode(Payload(pipeline, payload.data[:size], payload.scale), "w", (8, 8))
    with pytest.raises(ValueError, match="1 bytes are left over"):
        decode(Payload(pipeline, torch.cat([payload.data, payload.data[:1]]), payload.scale), "w", (8, 8))
