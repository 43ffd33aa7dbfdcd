"""Masks: well-formed at any rate and size, with the statistics they promise, and equal to the reference decoder's."""

import math
import time

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dtrain.errors import InputError
from dtrain.stages import All, Bernoulli, Stratified, random_mask
from dtrain.stages.select import _gap_tables
from tests.artifact import reference_stages as reference

KINDS = [Bernoulli, Stratified]
RATES = st.one_of(st.floats(-6, -0.0005).map(lambda power: 10**power), st.sampled_from([0.5, 0.25, 1 / 3, 0.999]))
both = pytest.mark.parametrize("kind", KINDS)


def mask(kind, keep, seed=0, name="w", numel=1000):
    return kind(keep, seed).positions(name, (1, numel))


@given(st.sampled_from(KINDS), RATES, st.integers(0, 3000), st.integers(0, 2**64 - 1), st.text(max_size=8))
@example(Bernoulli, 0.5, 0, 0, "")
@example(Stratified, 0.999, 1, 0, "")
@example(Stratified, math.nextafter(0.5, 1), 3000, 0, "w")
def test_any_mask_is_well_formed_and_the_references(kind, keep, numel, seed, name):
    select = kind(keep, seed)
    found = select.positions(name, (1, numel))
    assert found.dtype == torch.int64
    assert bool((found.diff() > 0).all())
    assert found.numel() == 0 or (int(found[0]) >= 0 and int(found[-1]) < numel)
    least, most = select.count_bounds((1, numel))
    assert 0 <= least <= found.numel() <= most <= numel
    assert found.tolist() == reference.positions((select.tag, keep, seed), name, (1, numel))


@both
@pytest.mark.parametrize("keep", [2.0**-24, 3e-7, 1 - 2.0**-20])
def test_extreme_rates_are_the_references(kind, keep):
    numel = 1 << 28 if keep < 0.5 else 2000
    assert mask(kind, keep, numel=numel).tolist() == reference.positions((kind.tag, keep, 0), "w", (1, numel))


@both
@pytest.mark.parametrize("grid", [(3, 400), (1200, 1), (1, 1200)])
def test_rows_do_not_matter(kind, grid):
    assert torch.equal(kind(0.3, 0).positions("w", grid), mask(kind, 0.3, numel=1200))


@both
@pytest.mark.parametrize("grid", [(0, 5), (5, 0), (0, 0)])
def test_nothing_of_nothing(kind, grid):
    assert kind(0.3, 0).positions("w", grid).shape == (0,)


@both
@pytest.mark.parametrize("keep", [0.01, 0.7])
def test_threads_do_not_matter(kind, keep):
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(mask(kind, keep, numel=200_000))
    assert torch.equal(*found)


@given(RATES, st.integers(0, 10**6), st.integers(1, 10**6))
def test_a_bernoulli_mask_of_a_longer_tensor_starts_alike(keep, numel, more):
    assume(keep * (numel + more) < 10**5)
    short, long = (mask(Bernoulli, keep, numel=n) for n in (numel, numel + more))
    assert torch.equal(long[long < numel], short)


@pytest.mark.parametrize("keep", [0.03, 0.3, 0.9])
def test_bernoulli_is_independent(keep):
    """800 masks of 64 elements: every position, every pair of neighbours and the count, within five deviations."""
    rounds, numel = 800, 64
    chosen = torch.zeros(rounds, numel, dtype=torch.float64)
    for i in range(rounds):
        chosen[i, mask(Bernoulli, keep, seed=i, numel=numel)] = 1
    each = chosen.mean(0)
    assert float((each - keep).abs().max()) < 5 * math.sqrt(keep * (1 - keep) / rounds)
    pairs = (chosen[:, 1:] * chosen[:, :-1]).mean(0)
    assert float((pairs - keep**2).abs().max()) < 5 * math.sqrt(keep**2 * (1 - keep**2) / rounds)
    variance = float(chosen.sum(1).var()) / (numel * keep * (1 - keep))
    assert abs(variance - 1) < 5 * math.sqrt(2 / rounds)  # of a sample variance, nearly normal


@pytest.mark.parametrize("keep", [2.0**-24, 1e-4, 0.01, 0.1, 0.5, 0.999, 1 - 2.0**-40])
def test_a_gap_that_is_looked_up_is_the_one_that_is_searched_for(keep):
    for table in _gap_tables(keep, 6):
        edges = (torch.arange(1 << 12) << 20).repeat(2) - torch.tensor([0, 1]).repeat_interleave(1 << 12)
        near = torch.cat([edges, table.entries - 1, table.entries, table.entries + 1, torch.randint(1 << 32, (5000,))])
        draws = near[(near >= 0) & (near < 1 << 32)]
        assert table.invert(draws).equal(torch.searchsorted(-table.entries, -draws))


@pytest.mark.parametrize("keep", [2.0**-20, 1e-4, 0.2])
def test_bernoulli_gaps_are_geometric(keep):
    """Kolmogorov-Smirnov at the 0.001 level; the small rates need the table of high parts."""
    gaps = mask(Bernoulli, keep, numel=int(8192 / keep)).diff()
    counts = torch.bincount(torch.searchsorted(grid := geometric_quantiles(keep), gaps), minlength=grid.numel() + 1)
    empirical = counts.cumsum(0)[:-1].double() / gaps.numel()
    expected = 1 - torch.exp(grid.double() * math.log1p(-keep))
    assert float((empirical - expected).abs().max()) < 1.95 / math.sqrt(gaps.numel())


def geometric_quantiles(keep):
    levels = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    return (torch.log1p(-levels) / math.log1p(-keep)).ceil().long().clamp(min=1).unique()


@pytest.mark.parametrize("size", [2, 3, 4, 10, 64, 100, 4096])
def test_stratified_keeps_one_of_every_group(size):
    found = mask(Stratified, 1 / size, numel=500 * size)
    assert (found // size).tolist() == list(range(500))
    offsets = (found % size).double() / (size - 1)  # uniform: the mean within five deviations
    assert abs(float(offsets.mean()) - 0.5) < 5 * math.sqrt((size + 1) / (12 * (size - 1)) / 500)


@pytest.mark.parametrize("size", [4, 10])
def test_stratified_drops_one_of_every_group_above_one_half(size):
    found = mask(Stratified, 1 - 1 / size, numel=500 * size)
    assert torch.bincount(found // size).tolist() == [size - 1] * 500


@pytest.mark.parametrize("keep", [0.013, 0.07, 0.37, 0.49, 0.51, 0.63, 0.93])
def test_stratified_realised_rate(keep):
    """At most keep**2 / 4 short of keep (above one half: as much too many), within five deviations of Bernoulli."""
    numel, rate = 200_000, min(keep, 1 - keep)
    share = mask(Stratified, keep, numel=numel).numel() / numel
    share = share if keep <= 0.5 else 1 - share
    slack = 5 * math.sqrt(rate * (1 - rate) / numel)
    assert rate - rate**2 / 4 - slack < share < rate + slack


@both
@pytest.mark.parametrize("other", [{"seed": 1}, {"seed": 2**63}, {"name": "v"}, {"name": "w "}])
def test_masks_of_other_seeds_and_names_are_independent(kind, other):
    keep, numel = 0.1, 200_000
    first, second = mask(kind, keep, numel=numel), mask(kind, keep, numel=numel, **other)
    overlap = int(torch.isin(first, second, assume_unique=True).sum())
    assert abs(overlap - keep**2 * numel) < 5 * keep * math.sqrt(numel)


@both
def test_cost_follows_what_is_kept(kind):
    start = time.perf_counter()
    found = mask(kind, 2.0**-20, numel=1 << 33)
    assert time.perf_counter() - start < 2
    assert abs(found.numel() - 8192) < 5 * math.sqrt(8192)
    assert int(found[-1]) > 1 << 32


@both
@pytest.mark.parametrize("keep", [0.0, -0.1, 1.0, 1.5, math.nan, math.inf, 2.0**-25])
def test_bad_rates_are_refused(kind, keep):
    with pytest.raises(InputError, match="`keep` must be in"):
        kind(keep, 0)


@both
@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_bad_seeds_are_refused(kind, seed):
    with pytest.raises(InputError, match="`seed` must be in"):
        kind(0.5, seed)


def test_random_mask_by_name():
    assert random_mask("bernoulli", 0.1, 3) == Bernoulli(0.1, 3)
    assert random_mask("stratified", 0.1, 3) == Stratified(0.1, 3)
    assert random_mask("stratified", 1, 3) == All()
    assert All().positions("w", (2, 3)) is None
    with pytest.raises(InputError, match="`mask` must be"):
        random_mask("uniform", 0.1, 0)
