"""UltraDelta: levels keep equal shares, groups go by spread, scales by trace norm."""

import pytest
import torch

from dtrain import UltraDelta
from tests.methods.oracles import affine
from tests.methods.settings import dense, rebuilt


def levels(delta, bits):
    return torch.tensor(affine(delta.double().flatten().tolist(), bits), dtype=torch.float64).view(delta.shape)


def kept_of(level, found):
    """How many elements of every level that is not 0 there are, and how many of them are kept."""
    return {v: (int((level == v).sum()), int((found[level == v] != 0).sum())) for v in level.unique().tolist() if v}


@pytest.mark.parametrize("bits", [1, 2, 4, 6])
@pytest.mark.parametrize("keep", [0.05, 0.4, 0.9])
def test_every_level_keeps_the_same_share(bits, keep):
    delta = torch.randn(40, 50) + 0.3
    level, found = levels(delta, bits), rebuilt(UltraDelta(keep=keep, bits=bits), delta)
    for number, kept in kept_of(level, found).values():
        assert kept == max(1, round(keep * number))
    chosen = found != 0
    assert torch.allclose(found[chosen], level[chosen] / keep, rtol=1e-5)
    assert not bool(found[level == 0].any())


def test_all_levels_are_kept_at_one():
    delta = torch.randn(10, 20)
    assert torch.allclose(rebuilt(UltraDelta(keep=1, bits=3), delta), levels(delta, 3), rtol=1e-5)


def test_within_a_level_all_elements_have_the_same_chance():
    """Of 40 elements in two levels, over 500 seeds: within five deviations, which a choice by position is not."""
    delta = torch.tensor([[1.0] * 20 + [0.5] * 19 + [-0.1]])
    found = sum((rebuilt(UltraDelta(keep=0.3, bits=4, seed=seed), delta) != 0).double() for seed in range(500)) / 500
    chances = torch.tensor([[6 / 20] * 20 + [6 / 19] * 19 + [1.0]])
    assert float((found - chances).abs().max()) < 5 * (0.3 * 0.7 / 500) ** 0.5


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
        for number, kept in kept_of(levels(tensors[name], 4), found).values():
            assert kept == max(1, round(share * number)), name


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
