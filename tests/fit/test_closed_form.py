"""Closed forms against their formulas, written as loops."""

import math

import pytest
import torch
from torch import nn

import dtrain
from dtrain import BitDelta, Calibration, ClosedForm, Dare, DareX, Dbms, InputError, LogitChange, NeedsDataError
from dtrain.stages import decode
from tests.methods.settings import dense, module_of, same_bits

HOST = Dare(keep=0.3)
ROWS, COLUMNS = 6, 10


@pytest.fixture
def models():
    torch.manual_seed(0)
    base = {"a.weight": torch.randn(ROWS, COLUMNS), "a.bias": torch.randn(ROWS)}
    return base, {name: value + 0.1 * torch.randn(value.shape) for name, value in base.items()}


def calibration(state, tokens=40):
    x = torch.randn(tokens, COLUMNS, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, COLUMNS)
    return x, Calibration(module_of(state), [x], lambda module, batch: nn.functional.linear(batch, module.a.weight))


def payload(delta, name="a.weight"):
    (record,) = (record for record in delta.content.records if record.name == name)
    return record.payloads[-1]


def factor(base, tuned, fit, method=HOST, **more):
    plain, fitted = (payload(dtrain.compress(base, tuned, method, fit=f, **more)) for f in (None, fit))
    assert torch.equal(plain.data, fitted.data)
    return fitted.scale / plain.scale


def parts(base, tuned, method=HOST):
    """Return D and what is decoded of it, as nested lists."""
    delta = tuned["a.weight"] - base["a.weight"]
    found = dense([payload(dtrain.compress(base, tuned, method))], delta.shape, "a.weight")
    return delta.tolist(), found.tolist()


def each(d, e):
    return [(x, y) for row, other in zip(d, e, strict=True) for x, y in zip(row, other, strict=True)]


@pytest.mark.parametrize(
    ("rule", "formula"),
    [
        ("norm", lambda p: math.sqrt(sum(x * x for x, _ in p) / sum(y * y for _, y in p))),
        ("mean", lambda p: sum(abs(x) for x, _ in p) / sum(abs(y) for _, y in p)),
        ("parallel", lambda p: sum(x * x for x, _ in p) / sum(x * y for x, y in p)),
        ("mse", lambda p: sum(x * y for x, y in p) / sum(y * y for _, y in p)),
    ],
)
@pytest.mark.parametrize("method", [HOST, BitDelta()], ids=["Dare", "BitDelta"])
def test_rules_that_need_the_delta_only(models, rule, formula, method):
    assert factor(*models, ClosedForm(rule), method) == pytest.approx(formula(each(*parts(*models, method))), rel=1e-3)


def test_least_squares_in_the_outputs_for_the_very_mask(models):
    """The factor of least squared error of x @ W^T over all inputs, found by trying."""
    base, tuned = models
    x, seen = calibration(tuned)
    d, e = (torch.tensor(part) for part in parts(base, tuned))
    right, found = x @ d.T, x.double() @ e.double().T
    expected = float((right * found).sum() / found.square().sum())
    got = factor(base, tuned, ClosedForm("gram"), calibration=seen)
    assert got == pytest.approx(expected, rel=1e-3)
    losses = [float((right - got * scale * found).square().sum()) for scale in (0.98, 1.0, 1.02)]
    assert min(losses) == losses[1]


@pytest.mark.parametrize("rule", ["norm", "mean", "parallel", "mse", "gram"])
def test_rows_have_the_factor_of_their_own_row(models, rule):
    base, tuned = models
    seen = {"calibration": calibration(tuned)[1]} if rule == "gram" else {}
    delta = dtrain.compress(base, tuned, HOST, fit=ClosedForm(rule, "row"), **seen)
    fitted = dense([payload(delta)], (ROWS, COLUMNS), "a.weight")
    plain = dense([payload(dtrain.compress(base, tuned, HOST))], (ROWS, COLUMNS), "a.weight")
    for row in range(ROWS):
        one = {name: value.clone() for name, value in base.items()}
        one["a.weight"][row] = tuned["a.weight"][row]  # nothing else changes, so the tensor's factor is the row's
        expected = factor(base, one | {"a.bias": tuned["a.bias"]}, ClosedForm(rule), **seen)
        assert torch.allclose(fitted[row], expected * plain[row], rtol=5e-3, atol=1e-6)


def test_q_of_the_bound_and_of_the_expectation_are_those_of_the_method(models):
    base, tuned = models
    _, seen = calibration(tuned)
    method = DareX(keep=0.3, q="keep")
    bound = payload(dtrain.compress(base, tuned, DareX(keep=0.3, q="bound", eta=2.0), calibration=seen))
    fitted = payload(dtrain.compress(base, tuned, method, fit=ClosedForm("bound", eta=2.0), calibration=seen))
    assert fitted.scale == pytest.approx(bound.scale, rel=1e-6)
    searched = DareX(keep=0.3)  # its own search gives way to the fit, and asks for no objective
    other = payload(dtrain.compress(base, tuned, searched, fit=ClosedForm("bound", eta=2.0), calibration=seen))
    assert other.scale == pytest.approx(bound.scale, rel=1e-6)
    expected = payload(dtrain.compress(base, tuned, method, fit=ClosedForm("expected"), calibration=seen))
    assert 0.3 < 0.3 * payload(dtrain.compress(base, tuned, method)).scale / expected.scale <= 1


@pytest.mark.parametrize("q", ["keep", "search", 0.5])
@pytest.mark.parametrize("values", ["float16", "sign"])
def test_a_computed_q_takes_the_place_of_the_methods_own(models, q, values):
    base, tuned = models
    _, seen = calibration(tuned)
    bound = payload(dtrain.compress(base, tuned, DareX(keep=0.3, q="bound", values=values), calibration=seen))
    method = DareX(keep=0.3, q=q, values=values)
    fitted = payload(dtrain.compress(base, tuned, method, fit=ClosedForm("bound"), calibration=seen))
    assert fitted.scale == pytest.approx(bound.scale, rel=1e-6)


def test_eta_of_the_bound_is_searched_by_the_objective(models):
    base, tuned = models
    _, seen = calibration(tuned)
    module = nn.ModuleDict({"a": nn.Linear(COLUMNS, ROWS)})
    batches = [torch.randn(30, COLUMNS)]
    losses = {}
    for eta in ("search", 0.001, 1.0, 1000.0):
        objective = LogitChange(module, batches, lambda module, batch: module.a(batch))
        fit = ClosedForm("bound", eta=eta)
        delta = dtrain.compress(base, tuned, DareX(keep=0.3), fit=fit, objective=objective, calibration=seen)
        losses[eta] = delta.content.metadata["fit"]["loss"]
    assert losses["search"] == min(losses.values())
    with pytest.raises(InputError, match="eta='search' compares by an objective"):
        dtrain.compress(base, tuned, DareX(keep=0.3), fit=ClosedForm("bound", eta="search"), calibration=seen)


@pytest.mark.parametrize("rule", ["norm", "mean", "parallel", "mse"])
def test_every_matrix_has_a_scale_of_its_own(rule):
    torch.manual_seed(0)
    base = {f"{i}.weight": torch.randn(ROWS, COLUMNS) for i in range(3)}
    tuned = {name: value + 10.0 ** (-int(name[0])) * torch.randn(value.shape) ** 3 for name, value in base.items()}
    together = dtrain.compress(base, tuned, HOST, fit=ClosedForm(rule))
    for name in base:
        alone = dtrain.compress(base, base | {name: tuned[name]}, HOST, fit=ClosedForm(rule))
        assert payload(together, name).scale == payload(alone, name).scale


def test_of_a_shifted_base_the_residuals_scale_is_computed(models):
    base, tuned = models
    method = Dbms(BitDelta(), split=None, lam=0.7)
    first, second = dtrain.compress(base, tuned, method, fit=ClosedForm("mse")).content.records[1].payloads
    delta = (tuned["a.weight"] - base["a.weight"]).double()
    rest = delta - dense([first], delta.shape, "a.weight")
    values = decode(second, "a.weight", delta.shape).values.view(delta.shape).double()
    assert second.scale == pytest.approx(float((rest * values).sum() / values.square().sum()), rel=1e-5)


def test_the_better_of_start_and_result_is_kept(models):
    base, tuned = models
    module = nn.ModuleDict({"a": nn.Linear(COLUMNS, ROWS)})
    objective = LogitChange(module, [torch.randn(30, COLUMNS)] * 2, lambda module, batch: module.a(batch))
    kept = {}
    for rule in ("mse", "norm", "mean"):
        delta = dtrain.compress(base, tuned, DareX(keep=0.3, q=1.0), fit=ClosedForm(rule), objective=objective)
        fit = delta.content.metadata["fit"]
        assert fit["loss"] <= fit["start"]
        kept[rule] = fit["kept"]
        if fit["kept"] == "start":
            plain = dtrain.compress(base, tuned, DareX(keep=0.3, q=1.0))
            assert same_bits(delta.state_dict(base), plain.state_dict(base))
    assert "fit" in kept.values()


def test_where_nothing_follows_the_scale_stays(models):
    base, tuned = models
    unseen = Calibration(module_of(tuned), [torch.randn(3, COLUMNS)], lambda module, batch: batch)
    assert factor(base, tuned, ClosedForm("gram"), calibration=unseen) == 1.0
    same = {"a.weight": base["a.weight"].clone(), "a.bias": tuned["a.bias"]}
    same["a.weight"][0, 0] += 1.0  # one element differs, and the mask of this seed may not keep it
    dtrain.compress(base, same, Dare(keep=0.01), fit=ClosedForm("mse"))


@pytest.mark.parametrize(
    ("fit", "method", "error", "message"),
    [
        (ClosedForm("gram"), HOST, NeedsDataError, "ClosedForm looks at the covariance of every layer but got no cal"),
        (ClosedForm("norm", "row"), Dbms(lam=1.0), InputError, "rows of a base vector and of its residual"),
        (ClosedForm("norm"), Dbms(lam=1.0, eta=1.0), InputError, "is fixed by the method"),
    ],
    ids=["no calibration", "rows of two", "fixed"],
)
def test_what_cannot_be_computed_is_a_sentence(models, fit, method, error, message):
    with pytest.raises(error, match=message):
        dtrain.compress(*models, method, fit=fit)


def test_a_q_for_a_method_without_one_is_a_sentence(models):
    base, tuned = models
    with pytest.raises(InputError, match="finds a q, which BitDelta does not leave open"):
        dtrain.compress(base, tuned, BitDelta(), fit=ClosedForm("bound"), calibration=calibration(tuned)[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "best"}, "`rule` must be 'norm' or"),
        ({"rule": "bound", "per": "row"}, "rule='bound' is a mean over rows"),
        ({"eta": 0.0}, "`eta` must be a positive number"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        ClosedForm(**arguments)
