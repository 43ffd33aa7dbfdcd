"""The dead-zone quantiser: its levels, its choice of step and zone, and the page's table of what it leaves."""

import math

import pytest
import torch

from dtrain import Ecsq
from dtrain.methods import ecsq
from tests.methods.settings import dense, rebuilt

SIDE = 1024
SAMPLES = {
    "gauss": torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(1)),
    "t5": torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    / (torch.randn(5, SIDE, SIDE, generator=torch.Generator().manual_seed(3)).square().mean(0)).sqrt(),
}
TABLE = {  # METHODS.md, section 6: energy left at R bits per parameter
    ("gauss", 1.0): 0.348,
    ("gauss", 0.25): 0.789,
    ("gauss", 0.0625): 0.941,
    ("t5", 1.0): 0.292,
    ("t5", 0.25): 0.675,
    ("t5", 0.0625): 0.865,
}


def bits(payloads):
    return 8 * sum(payload.data.numel() for payload in payloads)


def left(delta, found):
    return float((delta - found).square().sum() / delta.double().square().sum())


@pytest.mark.parametrize(("law", "rate"), TABLE)
def test_it_meets_its_bits_and_the_table(law, rate):
    delta, method = SAMPLES[law], Ecsq(bits=rate)
    payloads = method.plan([("w", lambda: delta)])("w", delta, None)
    assert bits(payloads) / delta.numel() == pytest.approx(rate, rel=0.01)
    assert left(delta, dense(payloads, delta.shape)) == pytest.approx(TABLE[law, rate], rel=0.02)


@pytest.mark.parametrize("rate", [0.1, 0.7, 2.0, 4.0])
def test_levels_are_of_one_width_beyond_the_zone_and_decode_to_their_means(rate):
    """c = floor(|D| / step + 1 - z): level c begins at (c - 1 + z) steps; its value is the mean of what it holds."""
    delta = SAMPLES["gauss"][:256].double()
    found = rebuilt(Ecsq(bits=rate), delta.float())
    zone = Ecsq(bits=rate).encode("w", delta.float())[0].pipeline.quantise.zone
    assert bool((found * delta >= 0).all())
    size, value = delta.abs(), found.abs()
    values = sorted(set(value.flatten().tolist()))
    edges = [float(size[value == v].min()) for v in values]
    assert values[0] == 0
    step = edges[1] / zone  # to one sample in 2**18
    for level, (v, edge) in enumerate(zip(values, edges, strict=True)):
        held = size[value == v]
        if level and len(held) > 100:
            assert edge == pytest.approx((level - 1 + zone) * step, rel=0.02)
            assert v == pytest.approx(float(held.mean()), rel=2**-10)


def entropy(level):
    shares = torch.unique(level, return_counts=True)[1].double() / level.numel()
    return -float((shares * shares.log2()).sum())


def quantised(delta, step, zone):
    """Levels with a sign, and what they decode to."""
    level = delta.sign() * (delta.abs() / step + 1 - zone).floor().clamp_min(0)
    out = torch.zeros_like(delta)
    for c in level.abs().unique().tolist()[1:]:
        chosen = level.abs() == c
        out[chosen] = delta[chosen].abs().mean() * level[chosen].sign()
    return level, out


@pytest.mark.parametrize("law", SAMPLES)
@pytest.mark.parametrize("rate", [0.15, 0.6, 1.5])
def test_no_other_step_and_zone_do_better_at_these_bits(law, rate):
    """Bisection of the step at many zones: none saves more than half a percent of the error."""
    delta, errors = SAMPLES[law][:32].double(), []
    for zone in (0.45, 0.55, 0.65, 0.7, 0.8, 0.9, 1.1, 1.35):
        low, high = 0.1, 20.0
        for _ in range(16):
            step = math.sqrt(low * high)
            low, high = (step, high) if entropy(quantised(delta, step, zone)[0]) > rate else (low, step)
        errors.append(left(delta, quantised(delta, high, zone)[1]))
    assert left(delta, rebuilt(Ecsq(bits=rate), delta.float())) < 1.005 * min(errors)


def test_one_step_for_all_tensors_spends_bits_where_they_save_most():
    """Two tensors of different sizes: together they meet the bits, at less error than with as many bits each."""
    tensors = {"small": 0.2 * SAMPLES["gauss"][:300], "great": SAMPLES["gauss"][300:400]}
    total = sum(delta.numel() for delta in tensors.values())
    planned = Ecsq(bits=0.5).plan([(name, lambda d=d: d) for name, d in tensors.items()])
    apart, together = {}, {}
    for name, delta in tensors.items():
        apart[name], together[name] = Ecsq(bits=0.5).encode(name, delta), planned(name, delta, None)
    for payloads in (apart, together):
        assert sum(map(bits, payloads.values())) / total == pytest.approx(0.5, rel=0.01)
    assert bits(together["great"]) / tensors["great"].numel() > 3 * bits(together["small"]) / tensors["small"].numel()
    errors = [
        sum(float((d - dense(payloads[n], d.shape, n)).square().sum()) for n, d in tensors.items())
        for payloads in (together, apart)
    ]
    assert errors[0] < 0.85 * errors[1]


def test_a_sample_sees_all_columns(monkeypatch):
    """With an even stride the choice would hang on a few columns of a matrix whose columns differ."""
    monkeypatch.setattr(ecsq, "_SAMPLE", SIDE**2 // 16)
    delta = SAMPLES["gauss"] * torch.where(torch.arange(SIDE) % 4 == 0, 0.05, 1.0)
    assert bits(Ecsq(bits=0.5).encode("w", delta)) / delta.numel() == pytest.approx(0.5, rel=0.03)


def test_there_are_127_levels_each_way():
    """What they cannot use is not spent: the figures of the method card."""
    for law, least in (("gauss", 6.0), ("t5", 4.0)):
        delta = SAMPLES[law][:512]
        assert bits(Ecsq(bits=least).encode("w", delta)) / delta.numel() == pytest.approx(least, rel=0.01)
        assert bits(Ecsq(bits=8).encode("w", delta)) / delta.numel() < least + 1
        found = rebuilt(Ecsq(bits=8), delta)
        assert float((found - delta).abs().max()) < 1.3 * float(delta.abs().max()) / 127


@pytest.mark.parametrize("delta", [torch.zeros(4, 4), torch.full((4, 4), 3.0), torch.tensor([[0.0, 5.0]])], ids=str)
def test_deltas_of_few_values_are_recovered(delta):
    found = rebuilt(Ecsq(bits=2), delta)
    assert torch.allclose(found, delta.double(), rtol=2**-10)
