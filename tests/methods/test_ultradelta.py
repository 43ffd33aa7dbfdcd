"""UltraDelta: levels keep equal shares, groups go by spread, scales by trace norm."""

import itertools

import pytest
import torch

from dtrain import UltraDelta
from tests.methods.oracles import affine
from tests.methods.settings import dense, rebuilt


def levels(delta, bits):
    return torch.tensor(affine(delta.double().flatten().tolist(), bits), dtype=torch.float64).view(delta.shape)


def check_shares(level, found, share):
    """Every run of adjacent levels, one by itself or all of one sign, keeps its share to within one element."""
    there = level.unique().tolist()  # ascending; what is kept of level 0 is not stored
    for run in ([v for v in there if v < 0], [v for v in there if v > 0]):
        for first, last in itertools.combinations_with_replacement(run, 2):
            among = (level >= first) & (level <= last)
            assert abs(int((found[among] != 0).sum()) - share * int(among.sum())) < 1, (first, last)


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("keep", [0.05, 0.4, 0.9])
def test_every_level_keeps_the_same_share(bits, keep):
    delta = torch.randn(40, 50) + 0.3
    level, found = levels(delta, bits), rebuilt(UltraDelta(keep=keep, bits=bits), delta)
    check_shares(level, found, keep)
    chosen = found != 0
    assert torch.allclose(found[chosen], level[chosen] / keep, rtol=1e-5)
    assert not bool(found[level == 0].any())


def test_all_levels_are_kept_at_one():
    delta = torch.randn(10, 20)
    assert torch.allclose(rebuilt(UltraDelta(keep=1, bits=3), delta), levels(delta, 3), rtol=1e-5)


def test_all_elements_and_all_pairs_of_a_level_have_the_same_chance():
    """Of 40 elements in levels of 20, 19 and 1, over 500 seeds: within five deviations.

    A level of 20 keeps 6, so a pair of its elements 6 * 5 / (20 * 19): a choice by position keeps some pairs never.
    """
    delta, rounds = torch.tensor([[1.0] * 20 + [0.5] * 19 + [-0.1]]), 500
    kept = torch.cat([rebuilt(UltraDelta(keep=0.3, bits=4, seed=seed), delta) != 0 for seed in range(rounds)]).double()
    assert float((kept.mean(0) - 0.3).abs().max()) < 5 * (0.3 * 0.7 / rounds) ** 0.5
    assert kept[:, :20].sum(1).tolist() == [6] * rounds
    first, second = torch.combinations(torch.arange(20)).t()
    found, pair = (kept[:, first] * kept[:, second]).mean(0), 6 * 5 / (20 * 19)
    assert float((found - pair).abs().max()) < 5 * (pair * (1 - pair) / rounds) ** 0.5


@pytest.mark.parametrize("bits", [3, 6])
@pytest.mark.parametrize("keep", [0.2, 0.7])
def test_the_mean_over_seeds_is_the_quantised_delta(keep, bits):
    """Heavy tails, whose outer levels have one element each: every element within five standard errors of its level.

    An element that were kept always would come out 1 / keep too big.
    """
    delta, rounds = torch.distributions.StudentT(3.0).sample((20, 30)), 400
    level = levels(delta, bits)
    assert int((level == level.flatten()[level.abs().argmax()]).sum()) == 1
    mean = (
        sum(rebuilt(UltraDelta(keep=keep, bits=bits, gamma=1.0, seed=seed), delta) for seed in range(rounds)) / rounds
    )
    assert bool(((mean - level).abs() <= 5 * level.abs() * ((1 / keep - 1) / rounds) ** 0.5).all())


def test_names_have_choices_of_their_own():
    delta = torch.randn(30, 30)
    a, b = (dense(UltraDelta().encode(name, delta), delta.shape, name) != 0 for name in "ab")
    assert not torch.equal(a, b)


def model(count):
    """Tensors of one direction but different sizes and shapes: spread and trace norm go apart."""
    return {f"{i}": (1 + i) * torch.randn(30 + 20 * ((i * 3) % 5), 40) for i in range(count)}


def planned(method, tensors):
    encoder = method.plan([(name, lambda d=d: d) for name, d in tensors.items()])
    return {name: dense(encoder(name, d, None), d.shape, name) for name, d in tensors.items()}


THIRDS = {1: [0], 2: [-1, 1], 3: [-1, 0, 1], 4: [-1, 0, 0, 1], 6: [-1, -1, 0, 0, 1, 1], 7: [-1, -1, 0, 0, 0, 1, 1]}


@pytest.mark.parametrize(("count", "thirds"), THIRDS.items())
def test_three_groups_by_standard_deviation(count, thirds):
    """The wider a tensor's delta, the more of it is kept; the names are sorted by their spread here."""
    tensors, method = model(count), UltraDelta(keep=0.4, step=0.5, gamma=1.0)
    assert [float(d.std()) for d in tensors.values()] == sorted(float(d.std()) for d in tensors.values())
    for (name, found), third in zip(planned(method, tensors).items(), thirds, strict=True):
        share = 0.4 * (1 + 0.5 * third)
        check_shares(levels(tensors[name], 4), found, share)


def test_the_scale_falls_linearly_with_the_trace_norm():
    tensors, gamma = model(5), 0.6
    found = planned(UltraDelta(keep=0.4, step=0.0, gamma=gamma), tensors)
    traces = {name: float(torch.linalg.svdvals(d.double()).sum()) for name, d in tensors.items()}
    least, most = min(traces.values()), max(traces.values())
    for name, values in found.items():
        level = levels(tensors[name], 4)
        factor = (0.4 * values / level)[values != 0]
        expected = 1 - (1 - gamma) * (traces[name] - least) / (most - least)
        assert factor.tolist() == pytest.approx([expected] * len(factor), rel=1e-4), name
    assert {round(float((0.4 * v / levels(tensors[n], 4))[v != 0][0]), 4) for n, v in found.items()} >= {1.0, gamma}
