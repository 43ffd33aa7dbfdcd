"""Random dropping: the formulas element by element, and the noise of a layer's outputs over thousands of masks."""

import math
from dataclasses import replace

import pytest
import torch

import dtrain
from dtrain import Dare, DareX, InputError, SeededSign, Structured
from dtrain.methods.bound import bound_q
from tests.artifact import reference_stages as reference
from tests.methods.settings import HALF, RULES, calibration_of, dense, look, module_of, rebuilt, zoo

COPIES = 4000  # of one row, each with a mask of its own
FOUR_DEVIATIONS = 4 * math.sqrt(3 / COPIES)  # of a variance over so many copies: 11 %


def kept(delta, select):
    """The delta where it is kept, 0 elsewhere, by the second implementation of the masks."""
    mask = torch.zeros(delta.numel(), dtype=torch.bool)
    mask[list(reference.positions(select, "w", delta.shape))] = True
    return torch.where(mask.view(delta.shape), delta.double(), 0.0)


MASKS = [
    (Dare(keep=0.3, seed=4), (1, 0.3, 4)),
    (Dare(keep=0.25, seed=4, mask="stratified"), (2, 0.25, 4)),
    (Structured(keep=0.4, seed=4, q="keep"), (4, 1, 1, 0.4, 4)),
    (Structured(keep=0.4, seed=4, q="keep", unit="row"), (4, 0, 1, 0.4, 4)),
    (Structured(keep=0.4, seed=4, q="keep", unit="block", block=5), (4, 2, 5, 0.4, 4)),
]


@pytest.mark.parametrize(("method", "select"), MASKS, ids=repr)
def test_what_is_kept_is_divided_by_keep(method, select):
    delta = torch.randn(12, 33)
    assert torch.allclose(rebuilt(method, delta), kept(delta, select) / method.keep, rtol=HALF, atol=0)


@pytest.mark.parametrize("q", [0.1, 0.4, 1.0])
def test_seeded_signs_share_one_magnitude(q):
    delta = torch.randn(12, 33)
    masked = kept(delta, (2, 0.1, 4))
    magnitude = masked.abs().sum() / masked.count_nonzero() / q
    found = rebuilt(SeededSign(keep=0.1, seed=4, q=q), delta)
    assert torch.allclose(found, magnitude * masked.sign(), rtol=1e-6, atol=0)


def test_q_is_a_division():
    delta = torch.randn(40, 30)
    (dare,), (fixed,) = Dare(keep=0.25).encode("w", delta), DareX(keep=0.25, q=0.25).encode("w", delta)
    assert (torch.equal(dare.data, fixed.data), dare.scale) == (True, fixed.scale)
    plain = rebuilt(DareX(keep=0.25, q=1.0), delta)
    assert torch.allclose(rebuilt(DareX(keep=0.25, q=0.4), delta), plain / 0.4, rtol=1e-6)
    assert torch.allclose(plain[plain != 0], delta.double()[plain != 0], rtol=HALF)


@pytest.mark.parametrize("values", ["float16", "bfloat16", "uniform8", "uniform4", "uniform2", "sign"])
@pytest.mark.parametrize("mask", ["bernoulli", "stratified"])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_norm_matching_keeps_the_norm(values, mask, size):
    delta = size * torch.randn(100, 50)
    found = rebuilt(DareX(keep=0.05, q="norm", values=values, mask=mask), delta)
    assert float(found.norm() / delta.double().norm()) == pytest.approx(1, rel=1e-3)


def test_norm_matching_where_nothing_is_kept():
    delta = torch.randn(1, 3)
    assert float(rebuilt(DareX(keep=1e-6, q="norm"), delta).abs().sum()) == 0
    assert float(rebuilt(DareX(keep=0.5, q="norm"), torch.zeros(40, 40)).abs().sum()) == 0


@pytest.mark.parametrize("method", [Dare(keep=2.0**-16), DareX(keep=0.5, q=2.0**-16)])
def test_scales_beyond_float32_are_refused_with_a_sentence(method):
    base = {"w": torch.zeros(512, 512)}
    with pytest.raises(InputError, match=r"'w': a scale of .* does not fit float32"):
        dtrain.compress(base, {"w": torch.full((512, 512), 3e38)}, method)


def contributions(columns=64):
    """c_j = D_ij x_j of one output, with a mean that is not 0: the row and the input."""
    return torch.randn(columns) + 0.3, torch.randn(columns).abs() + 0.1


def errors(method, row, x, across):
    """H of many copies of one row, side by side where units are columns: each meets a mask of its own."""
    tiled = row.repeat(1, COPIES) if across else row.repeat(COPIES, 1)
    return ((tiled - rebuilt(method, tiled)).view(COPIES, -1) * x.double()).sum(1)


def assert_moments(found, mean, variance):
    assert float(found.mean()) == pytest.approx(mean, abs=4 * math.sqrt(variance / COPIES))
    assert float(found.var()) == pytest.approx(variance, rel=FOUR_DEVIATIONS)


@pytest.mark.parametrize(("keep", "q"), [(0.1, 0.1), (0.1, 0.3), (0.5, 0.5), (0.02, 1.0), (0.8, 0.9)])
def test_the_noise_of_an_output_has_the_papers_mean_and_variance(keep, q):
    """E[H] = (1 - keep/q) S, Var[H] = keep (1-keep) / q^2 * Q: DARE where q = keep."""
    row, x = contributions()
    c = (row * x).double()
    mean, variance = (1 - keep / q) * float(c.sum()), keep * (1 - keep) / q**2 * float(c.square().sum())
    assert_moments(errors(DareX(keep=keep, q=q), row, x, across=False), mean, variance)


@pytest.mark.parametrize(("unit", "side"), [("column", 1), ("row", 64), ("block", 8)])
def test_whole_units_have_the_noise_of_their_sums(unit, side):
    """Var[H] = keep (1-keep) / q^2 * sum_g C_g^2: more than that of single elements where a unit has many of them."""
    keep, q = 0.3, 0.5
    row, x = contributions()
    units = (row * x).double().view(-1, side).sum(1)
    variance = keep * (1 - keep) / q**2 * float(units.square().sum())
    method = Structured(keep=keep, q=q, unit=unit, block=max(side, 2))
    assert_moments(errors(method, row, x, across=unit != "row"), (1 - keep / q) * float(units.sum()), variance)


@pytest.mark.parametrize("alpha", [2, 4, 16])
def test_strata_remove_the_mean_from_the_noise(alpha):
    """Var[H] = sum_g (alpha Q_g - C_g^2) with one survivor a group; (alpha - 1) sum_g Q_g with independent coins."""
    row, x = contributions()
    groups = (row * x).double().view(-1, alpha)
    strata = float((alpha * groups.square().sum(1) - groups.sum(1).square()).sum())
    coins = (alpha - 1) * float(groups.square().sum())
    found = {
        mask: errors(Dare(keep=1 / alpha, mask=mask), row, x, across=False) for mask in ("stratified", "bernoulli")
    }
    assert_moments(found["stratified"], 0.0, strata)
    assert_moments(found["bernoulli"], 0.0, coins)
    assert strata < coins


@pytest.mark.parametrize("signed", [False, True])
def test_the_bound_gives_every_layer_its_own_q(signed):
    """A weight stored as (inputs, outputs) is seen turned over; what is no layer's weight is divided by keep."""
    base, tuned = zoo()
    method = DareX(keep=0.2, q="bound", eta=0.05, signed=signed)
    calibration = calibration_of(tuned)
    delta = dtrain.compress(base, tuned, method, calibration=calibration, rules=RULES)
    plain = dtrain.compress(base, tuned, replace(method, q=1.0), rules=RULES)
    scales = {record.name: record.payloads[0].scale for record in plain.content.records if record.payloads}
    names = [name for name in scales if RULES.role(name, tuned[name].shape, tuned[name].dtype) == "method"]
    inputs = dtrain.Calibration(module_of(tuned), [0, 1], look).collect(names)
    assert set(delta.content.metadata["uncalibrated"]) == set(names) - set(inputs)
    found = {r.name: scales[r.name] / r.payloads[0].scale for r in delta.content.records if r.name in names}
    for name, q in found.items():
        expected = method.keep
        if name in inputs:
            change = (tuned[name].double() - base[name].double()).float()
            matrix = change.t() if name == "conv1d" else change.reshape(len(change), -1)
            expected = bound_q(matrix, inputs[name].sample, 0.2, 0.05, signed=signed)
        assert q == pytest.approx(expected, rel=1e-5), name
    assert len(set(found.values())) > 5


def test_payloads_add_up_as_in_a_model():
    """`dense`, which these tests stand on, against the weights that a delta gives."""
    base, tuned = {"w": torch.zeros(9, 7)}, {"w": torch.randn(9, 7)}
    delta = dtrain.compress(base, tuned, dtrain.EoRA(dtrain.BitDelta(), 2, weighted=False))
    (record,) = delta.content.records
    found = dense(record.payloads, (9, 7))
    assert torch.allclose(found.float(), delta.state_dict(base)["w"], atol=1e-6)
