"""q in closed form: against the bound itself, on a grid; and the bound against all masks, one by one."""

import itertools
import math

import pytest
import torch

from dtrain import InputError
from dtrain.methods.bound import bound_q, least_squares_q

KEEPS = [0.02, 0.3, 0.5, 0.5 + 1e-9, 0.8, 1.0]
GRID = 20_001  # points in u = 1/q


def phi(keep):
    p = 1 - keep
    if p in (0, 1):
        return 0.0
    return 0.5 if abs(p - 0.5) < 1e-6 else (1 - 2 * p) / math.log((1 - p) / p)


def bound(s, q2, keep, eta, q):
    return eta * (1 - keep / q) * s + eta**2 * phi(keep) * q2 / (4 * q**2)


def log_moment(c, keep, eta, q):
    """log E exp(eta H), every mask of len(c) coins one by one."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(c))), dtype=torch.float64)
    kept = masks.sum(1)
    weight = keep**kept * (1 - keep) ** (len(c) - kept)
    error = ((1 - masks / q) * c).sum(1)
    return float((weight * (eta * error).exp()).sum().log())


def grid(keep):
    return 1 / torch.linspace(1, 1 / keep, GRID, dtype=torch.float64)


def pair(rows=1, samples=1, columns=6, shift=0.4):
    return torch.randn(rows, columns) + shift, torch.randn(samples, columns).abs()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("eta", [0.03, 0.5, 4.0])
@pytest.mark.parametrize("keep", KEEPS)
def test_one_row_is_the_least_bound_on_a_grid(keep, eta, signed):
    for sign in (1, -1):
        delta, sample = pair()
        delta *= sign
        c = (delta * sample)[0].double()
        s, q = float(c.sum()), grid(keep)
        values = bound(s if signed else abs(s), float(c.square().sum()), keep, eta, q)
        found = bound_q(delta, sample, keep, eta, signed=signed)
        assert 1 / found == pytest.approx(float(1 / q[values.argmin()]), abs=(1 / keep - 1) / (GRID - 1) + 1e-12)
        assert keep <= found <= 1
        assert found == 1 or not signed or s > 0


@pytest.mark.parametrize("q", [0.1, 0.35, 1.0])
@pytest.mark.parametrize("eta", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.8])
def test_the_bound_bounds(keep, eta, q):
    for _ in range(5):
        c = torch.randn(8, dtype=torch.float64) + 0.2
        s, q2 = float(c.sum()), float(c.square().sum())
        assert log_moment(c, keep, eta, q) <= bound(s, q2, keep, eta, q) + 1e-9
        assert log_moment(-c, keep, eta, q) <= bound(-s, q2, keep, eta, q) + 1e-9


def test_the_bound_is_no_looser_than_it_has_to_be():
    """At keep = 1/2 and small eta a coin's moments are those of the bound: half of Phi would not do."""
    c = torch.tensor([1.0], dtype=torch.float64)
    exact = log_moment(c, 0.5, 1e-3, 0.5)
    assert exact == pytest.approx(bound(1.0, 1.0, 0.5, 1e-3, 0.5), rel=1e-5)


@pytest.mark.parametrize("signed", [False, True])
def test_the_result_is_the_mean_over_rows_and_samples(signed):
    delta, sample = pair(rows=2500, samples=3, shift=0.0)  # more rows than are widened at a time
    each = [bound_q(delta[[i]], sample[[j]], 0.1, 0.5, signed=signed) for i in range(0, 2500, 50) for j in range(3)]
    assert bound_q(delta[::50], sample, 0.1, 0.5, signed=signed) == pytest.approx(sum(each) / len(each), rel=1e-12)
    halves = [bound_q(half, sample, 0.1, 0.5, signed=signed) for half in (delta[:1250], delta[1250:])]
    assert bound_q(delta, sample, 0.1, 0.5, signed=signed) == pytest.approx(sum(halves) / 2, rel=1e-12)


def test_a_larger_eta_shrinks_more():
    delta, sample = pair(rows=20, samples=5)
    found = [bound_q(delta, sample, 0.05, 10.0**i) for i in range(-4, 4)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (pytest.approx(0.05, abs=1e-3), 1.0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_only_the_product_of_eta_and_the_scale_matters(scale):
    delta, sample = pair(rows=20, samples=5)
    assert bound_q(delta * scale, sample, 0.1, 0.5 / scale) == pytest.approx(bound_q(delta, sample, 0.1, 0.5), rel=1e-5)
    assert least_squares_q(delta * scale, sample, 0.1) == pytest.approx(least_squares_q(delta, sample, 0.1), rel=1e-5)


def test_rows_that_carry_nothing_are_left_out():
    delta, sample = pair(rows=4, samples=2)
    padded = torch.cat([delta, torch.zeros(7, 6)])
    silent = torch.cat([sample, torch.zeros(3, 6)])
    assert bound_q(padded, silent, 0.1, 0.5) == pytest.approx(bound_q(delta, sample, 0.1, 0.5), rel=1e-12)
    assert least_squares_q(padded, silent, 0.1) == pytest.approx(least_squares_q(delta, sample, 0.1), rel=1e-12)


@pytest.mark.parametrize("delta", [torch.zeros(2, 4), torch.zeros(0, 4), torch.tensor([[1.0, -1.0, 0.0, 0.0]])])
def test_without_a_signal_nothing_is_rescaled(delta):
    assert bound_q(delta, torch.ones(3, 4), 0.1, 0.5) == 1.0
    assert least_squares_q(delta, torch.ones(3, 4), 0.1) == 1.0


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.5, 0.8])
def test_least_squares_is_the_least_expected_square_on_a_grid(keep):
    delta, sample = pair(rows=3, samples=2)
    c = (delta[:, None] * sample).double().reshape(-1, 6)
    q = grid(keep)[:, None]
    expected = ((1 - keep / q) * c.sum(1)).square() + keep * (1 - keep) / q**2 * c.square().sum(1)
    best = float(1 / q[expected.sum(1).argmin()])
    assert 1 / least_squares_q(delta, sample, keep) == pytest.approx(best, abs=(1 / keep - 1) / (GRID - 1) + 1e-6)


def test_the_expected_square_is_that_of_masks():
    """20 000 masks: the mean square has a standard error below 1.5 %, four of which are allowed."""
    keep, q, c = 0.3, 0.45, torch.randn(50) + 0.2
    error = (c * (1 - (torch.rand(20_000, 50) < keep) / q)).sum(1)
    exact = (1 - keep / q) ** 2 * c.sum() ** 2 + keep * (1 - keep) / q**2 * c.square().sum()
    assert float(error.square().mean()) == pytest.approx(float(exact), rel=0.06)


def test_misuse_is_a_sentence():
    delta, sample = pair()
    for eta in (0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match=f"`eta` must be a finite number above 0, got {eta}"):
            bound_q(delta, sample, 0.1, eta)
    for keep in (0, 1.1, math.nan):
        with pytest.raises(InputError, match=rf"`keep` must be in \(0, 1\], got {keep}"):
            least_squares_q(delta, sample, keep)
    for wrong in (torch.randn(5, 5), torch.randn(6)):
        with pytest.raises(InputError, match=r"a delta of shape \(1, 6\) does not fit inputs of shape"):
            bound_q(delta, wrong, 0.1, 0.5)
    with pytest.raises(InputError, match=r"a delta of shape \(2, 3, 2\) does not fit"):
        bound_q(torch.randn(2, 3, 2), sample, 0.1, 0.5)
