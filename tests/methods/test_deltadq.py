"""DeltaDQ: groups, codes and parts by loops, and what the paper's ratio leaves out."""

import math

import pytest
import torch

import dtrain
from dtrain import DeltaDQ, InputError
from tests.artifact import reference_stages as reference
from tests.methods.oracles import affine
from tests.methods.settings import rebuilt

SPREAD = torch.linspace(0.2, 2, 16)[:, None]  # rows of different sizes, so that their ranges differ


def delta_dq(delta, alpha, size, bits, scope, seed):
    """Keep size / alpha of every group of `size`, multiply by alpha, quantise what shares a range together."""
    rows, columns = delta.shape
    flat, out = delta.double().flatten().tolist(), [0.0] * delta.numel()
    select = (0,) if alpha == 1 else (3, size, size // alpha, seed)
    ranges = {}
    for i in reference.positions(select, "w", (rows, columns)):
        block = {"tensor": 0, "row": i // columns}.get(scope, i // scope if isinstance(scope, int) else None)
        ranges.setdefault(block, []).append(i)
    for members in ranges.values():
        for i, value in zip(members, affine([flat[i] * alpha for i in members], bits), strict=True):
            out[i] = value
    return torch.tensor(out, dtype=torch.float64).view(rows, columns)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        (DeltaDQ(alpha=4, bits=4), 4),
        (DeltaDQ(alpha=4, bits=3, group=12, seed=5), 12),
        (DeltaDQ(alpha=4, bits=2, group="row", parts=4), 40),
        (DeltaDQ(alpha=7, bits=5, group="row"), 42),  # a row of 40 is taken as one of 42
        (DeltaDQ(alpha=1, bits=4), 1),
    ],
    ids=repr,
)
def test_groups_are_thinned_out_and_rounded(method, size):
    delta = torch.randn(16, 40) * SPREAD
    expected = delta_dq(delta, method.alpha, size, method.bits, "tensor", method.seed)
    assert torch.allclose(rebuilt(method, delta), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scope", ["row", 20, 7])
def test_rows_and_neighbours_have_ranges_of_their_own(scope, bits):
    delta = torch.randn(16, 40) * SPREAD
    found, expected = rebuilt(DeltaDQ(2, 4, bits, 2, scope), delta), delta_dq(delta, 2, 4, bits, scope, 0)
    # steps are halves: a code at the edge of its bin may move by one, rarely
    error = (found - expected).abs()
    assert float(error.median()) <= 2**-10 * float(expected.abs().max())
    assert float(error.norm()) < 0.03 * float(expected.norm())


@pytest.mark.parametrize(("alpha", "group"), [(2, 2), (4, 8), (8, 64), (8, "row"), (16, "alpha")])
def test_every_group_has_as_many_survivors(alpha, group):
    size = {"row": 64, "alpha": alpha}.get(group, group)
    found = rebuilt(DeltaDQ(alpha, group, bits=16, parts=1), torch.randn(10, 64))
    assert bool((found.view(-1, size).count_nonzero(dim=1) == size // alpha).all())


@pytest.mark.parametrize("bits", [1, 3, 4, 10])
def test_parts_change_nothing_but_the_order_of_codes(bits):
    delta = torch.randn(20, 40)
    whole = rebuilt(DeltaDQ(alpha=4, bits=bits, parts=1), delta)
    for high in range(1, min(8, bits) + 1):
        method = DeltaDQ(alpha=4, bits=bits, parts=2**high)
        assert torch.equal(rebuilt(method, delta), whole)
        assert method.nominal_bits == (bits - high) / 4


def entropy(symbols):
    shares = torch.bincount(symbols).double() / len(symbols)
    return -float((shares * shares.log2()).nan_to_num().sum())


@pytest.mark.parametrize("high", [1, 2, 3, 4])
def test_the_identity_of_its_part_is_paid_for_with_every_code(high):
    """(k - log2 m + H(part)) / alpha bits: with as many parts as codes, their entropy."""
    delta, method = torch.randn(256, 256), DeltaDQ(alpha=4, parts=2**high)
    (payload,) = method.encode("w", delta)
    places = reference.positions((3, 4, 1, 0), "w", delta.shape)
    zero = round(-4 * float(delta.flatten()[places].min()) / payload.scale)
    codes = (rebuilt(method, delta).flatten()[places] / payload.scale).round().long() + zero
    expected = method.nominal_bits + entropy(codes >> (4 - high)) / 4
    assert 8 * payload.data.numel() / delta.numel() == pytest.approx(expected, rel=0.01)


def test_the_papers_ratio_counts_neither_parts_nor_positions():
    """128x and 512x of 16 bits; positions cost nothing here either, but the identity of a part does."""
    delta = torch.randn(512, 512)
    for alpha, ratio in ((8, 128), (32, 512)):
        method = DeltaDQ(alpha=alpha)
        assert 16 / method.nominal_bits == ratio
        (payload,) = method.encode("w", delta)
        true = 16 * delta.numel() / (8 * payload.data.numel())
        assert 0.25 * ratio < true < 0.45 * ratio


def test_one_range_is_poor_on_heavy_tails():
    """The figures of the method card, of energy lost by the quantiser alone."""
    heavy = torch.distributions.StudentT(3.0).sample((512, 512))
    lost = {
        (bits, scope): float((rebuilt(DeltaDQ(1, bits=bits, scope=scope, parts=1), heavy) - heavy).square().sum())
        / float(heavy.square().sum())
        for bits, scope in [(4, "tensor"), (2, "tensor"), (4, "row"), (4, 128)]
    }
    assert lost[4, "tensor"] > 0.4
    assert lost[2, "tensor"] > 0.9
    assert lost[4, "row"] < 0.1
    assert lost[4, 128] < 0.05


def test_a_search_needs_compress():
    with pytest.raises(InputError, match=r"has no group yet\. Use dtrain\.compress with a calibration"):
        DeltaDQ(group="search").encode("w", torch.randn(4, 4))


def test_alpha_of_one_keeps_all():
    base = {"w": torch.zeros(8, 8)}
    tuned = {"w": torch.randn(8, 8)}
    found = dtrain.compress(base, tuned, DeltaDQ(alpha=1, bits=16)).state_dict(base)["w"]
    spread = float(tuned["w"].max() - tuned["w"].min())
    assert float((found - tuned["w"]).abs().max()) <= 0.5 * spread / (2**16 - 1) * (1 + 1e-3) + 1e-7
    assert math.isclose(DeltaDQ(alpha=1, bits=16, parts=1).nominal_bits, 16)
