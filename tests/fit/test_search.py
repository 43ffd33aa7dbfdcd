"""The search of q on toys whose best q is known."""

import math

import pytest
import torch
from torch import nn

import dtrain
from dtrain import DareX, HiddenChange, InputError, Metric
from dtrain.artifact import pack_file
from dtrain.stages import decode
from tests.methods.settings import module_of, same_bits

KEEP = 0.04
SPAN = math.log(1 / KEEP)
TOLERANCE = {"grid": SPAN / 36, "golden": SPAN / 60}  # half the last grid step, half the last bracket

searches = pytest.mark.parametrize("search", TOLERANCE)


def models(layers=1, **extra):
    base = {f"{i}.weight": torch.randn(30, 20) for i in range(layers)} | extra
    return base, {name: value + torch.randn(value.shape) for name, value in base.items()}


class Norms:
    """A parabola in log(1/q), one per layer: how far log ||W - W0|| is from a target."""

    label = "norms"

    def __init__(self, base, targets):
        self.module = module_of(base)
        self.base, self.targets, self.remembered, self.losses = base, targets, [], []

    def remember(self):
        self.remembered.append({name: value.clone() for name, value in self.module.state_dict().items()})

    def loss(self):
        state = self.module.state_dict()
        gaps = [math.log(float((state[n] - self.base[n]).norm())) - target for n, target in self.targets.items()]
        self.losses.append(sum(gap**2 for gap in gaps))
        return self.losses[-1]


def kept_norm(tuned, base, name, seed):
    (payload,) = DareX(keep=KEEP, q=1.0, seed=seed).encode(name, tuned[name] - base[name])
    return math.log(float(decode(payload, name, base[name].shape).values.norm()) * payload.scale)


def inverse_q(delta, base, tuned):
    plain = {r.name: r.payloads[0].scale for r in dtrain.compress(base, tuned, DareX(keep=KEEP, q=1.0)).content.records}
    return {r.name: math.log(r.payloads[0].scale / plain[r.name]) for r in delta.content.records if r.name in plain}


@searches
@pytest.mark.parametrize("share", [0.0, 0.1, 0.35, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("masks", [1, 3])
def test_the_best_q_is_found(search, share, masks):
    """With several masks the loss is a mean of parabolas, whose least point is the mean of theirs."""
    base, tuned = models()
    norms = [kept_norm(tuned, base, "0.weight", seed) for seed in range(masks)]
    target = sum(norms) / masks + share * SPAN
    objective = Norms(base, {"0.weight": target})
    delta = dtrain.compress(base, tuned, DareX(keep=KEEP, search=search, masks=masks), objective=objective)
    x = inverse_q(delta, base, tuned)["0.weight"]
    assert abs(x - share * SPAN) <= TOLERANCE[search] * 1.001
    fit = delta.content.metadata["fit"]
    assert fit["q"] == [pytest.approx(math.exp(-x), rel=1e-6)] * 2
    assert fit["evaluations"] * masks == len(objective.losses)
    expected = sum((norm + x - target) ** 2 for norm in norms) / masks
    assert fit["loss"] == pytest.approx(expected, rel=1e-3, abs=1e-5)
    dare = sum((norm + SPAN - target) ** 2 for norm in norms) / masks
    assert fit["start"] == pytest.approx(dare, rel=1e-3, abs=1e-5)
    assert fit["loss"] <= fit["start"]


def test_the_file_holds_the_first_mask():
    base, tuned = models()
    delta = dtrain.compress(base, tuned, DareX(keep=KEEP, seed=7), objective=Norms(base, {"0.weight": 1.0}))
    fixed = dtrain.compress(base, tuned, DareX(keep=KEEP, seed=7, q=1.0))
    (found,), (expected,) = (d.content.records[0].payloads for d in (delta, fixed))
    assert found.pipeline == expected.pipeline
    assert torch.equal(found.data, expected.data)


def test_a_fit_can_be_repeated():
    base, tuned = models(2)
    objective = Norms(base, {"0.weight": 3.0, "1.weight": 5.0})
    once, twice = (dtrain.compress(base, tuned, DareX(keep=KEEP, scope="layer"), objective=objective) for _ in range(2))
    assert list(map(bytes, pack_file(once.content))) == list(map(bytes, pack_file(twice.content)))


@searches
@pytest.mark.parametrize("targets", [(0.2, 0.8), (0.5, 0.5), (0.0, 1.0), (0.9, 0.1)])
def test_layer_scope_is_never_worse(search, targets):
    base, tuned = models(2)
    norms = {name: kept_norm(tuned, base, name, 0) for name in base}
    wanted = {name: norms[name] + share * SPAN for name, share in zip(base, targets, strict=True)}
    found = {}
    for scope in ("model", "layer"):
        method = DareX(keep=KEEP, search=search, masks=1, scope=scope)
        found[scope] = dtrain.compress(base, tuned, method, objective=Norms(base, wanted))
    losses = {scope: delta.content.metadata["fit"]["loss"] for scope, delta in found.items()}
    assert losses["layer"] <= losses["model"]
    x = inverse_q(found["layer"], base, tuned)
    assert all(-1e-6 <= value <= SPAN + 1e-6 for value in x.values())
    assert all(abs(x[name] - share * SPAN) < math.log(2) / 2 for name, share in zip(base, targets, strict=True))


def test_the_objective_sees_the_finetuned_model_once_then_what_a_file_would_give():
    """Everything the method does not compress stands as it will after decoding: half precision, dropped, whole."""
    extra = {"norm": torch.randn(20), "pos": torch.randn(3, 3), "head.weight": torch.randn(2, 20)}
    base, tuned = models(1, **extra)
    objective, seen = Norms(base, {"0.weight": 3.0}), []
    loss = objective.loss
    objective.loss = lambda: seen.append({n: v.clone() for n, v in objective.module.state_dict().items()}) or loss()
    rules = dtrain.Rules(drop=["pos"])
    delta = dtrain.compress(base, tuned, DareX(keep=KEEP, masks=1), objective=objective, rules=rules)
    (remembered,) = objective.remembered
    assert same_bits(remembered, tuned)
    final = delta.state_dict(base)
    for state in seen:
        assert same_bits({n: state[n] for n in extra}, {n: final[n] for n in extra})
    assert torch.equal(final["pos"], base["pos"])
    assert any(torch.allclose(state["0.weight"], final["0.weight"], rtol=1e-5, atol=1e-6) for state in seen)


class Failure(Exception):
    pass


@pytest.mark.parametrize("fail_at", [None, 0, 1, 5])
@pytest.mark.parametrize("scope", ["model", "layer"])
def test_the_module_is_restored_bit_for_bit(fail_at, scope):
    base, tuned = models(2, vector=torch.randn(9), table=torch.randn(6, 5).t())
    current = {name: torch.randn(value.shape) for name, value in base.items()}  # what the module holds meanwhile
    current["0.weight"][0, 0], current["1.weight"][0, 0] = math.nan, -0.0
    objective = Norms(base, {"0.weight": 3.0, "1.weight": 2.0})
    objective.module.load_state_dict(current)
    before = {name: value.clone() for name, value in objective.module.state_dict().items()}
    loss = objective.loss

    def failing():
        if len(objective.losses) + 1 == fail_at:
            raise Failure
        return loss()

    objective.loss = failing
    if fail_at == 0:
        objective.remember = lambda: (_ for _ in ()).throw(Failure)
    method = DareX(keep=KEEP, scope=scope, masks=2)
    if fail_at is None:
        dtrain.compress(base, tuned, method, objective=objective)
    else:
        with pytest.raises(Failure):
            dtrain.compress(base, tuned, method, objective=objective)
    assert same_bits(objective.module.state_dict(), before)


@searches
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_objective_that_is_never_finite_is_refused(search, bad):
    base, tuned = models()
    objective = Metric(module_of(base), lambda module: bad, mode="min")
    with pytest.raises(InputError, match="objective is NaN or infinite for every scale"):
        dtrain.compress(base, tuned, DareX(keep=KEEP, search=search), objective=objective)


@searches
def test_plain_dare_may_blow_up(search, tmp_path):
    """At q = keep the noise may overflow the model: the fit goes on, and its file can be saved."""
    base, tuned = models()
    objective = Norms(base, {"0.weight": kept_norm(tuned, base, "0.weight", 0)})
    loss = objective.loss
    objective.loss = lambda: math.nan if (value := loss()) > 0.8 * SPAN**2 else value
    delta = dtrain.compress(base, tuned, DareX(keep=KEEP, search=search, masks=1), objective=objective)
    delta.save(tmp_path / "delta")
    assert dtrain.load(tmp_path / "delta").content.metadata["fit"]["loss"] < 1


def test_a_plateau_is_met_in_its_middle():
    base, tuned = models()
    objective = Metric(module_of(base), lambda module: 1.0)
    delta = dtrain.compress(base, tuned, DareX(keep=KEEP), objective=objective)
    assert abs(inverse_q(delta, base, tuned)["0.weight"] - SPAN / 2) < SPAN / 10


@pytest.mark.parametrize("method", [DareX(keep=1), DareX(keep=1, search="golden"), DareX(keep=KEEP, seed=2**64 - 1)])
def test_corners_of_the_arguments(method):
    base, tuned = models()
    dtrain.compress(base, tuned, method, objective=Norms(base, {"0.weight": 3.0}))


def test_nothing_to_scale():
    """Only vectors differ: there is no q to fit, and nothing to stumble over."""
    base = {"bias": torch.zeros(5), "w": torch.ones(2, 2)}
    objective = Metric(module_of(base), lambda module: 0.0)
    delta = dtrain.compress(base, base | {"bias": torch.ones(5)}, DareX(), objective=objective)
    assert torch.allclose(delta.state_dict(base)["bias"], torch.ones(5))


@pytest.mark.parametrize(
    ("state", "message"),
    [({"other": torch.zeros(2)}, "no tensor '0.weight'"), ({"0.weight": torch.zeros(3, 3)}, "'0.weight'")],
    ids=["names", "shapes"],
)
def test_the_module_must_be_the_models(state, message):
    base, tuned = models()
    with pytest.raises(InputError, match=message):
        dtrain.compress(base, tuned, DareX(), objective=Metric(module_of(state), lambda module: 0.0))


def network():
    return nn.Sequential(nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 60), nn.ReLU(), nn.Linear(60, 3))


def test_a_searched_q_beats_dare_on_a_network():
    """The point of it all: at an extreme rate the fitted q changes the hidden state less than 1/keep does."""
    base, module = network(), network()
    tuned = {name: value + 0.05 * torch.randn(value.shape) for name, value in base.state_dict().items()}
    objective = HiddenChange(module, [torch.randn(32, 40)])
    fit = dtrain.compress(base, tuned, DareX(keep=0.02), objective=objective).content.metadata["fit"]
    assert 0.02 < fit["q"][0] <= 1
    assert fit["loss"] < 0.9 * fit["start"]


@pytest.mark.parametrize("scope", ["model", "layer"])
@pytest.mark.parametrize("which", ["base", "tuned"])
def test_the_objective_may_use_the_very_module_that_is_compressed(which, scope):
    """A module given as base or as fine-tuned model shares its memory with the one the fit writes to."""
    base, tuned, third = network(), network(), network()
    tuned.load_state_dict({name: value + 0.05 * torch.randn(value.shape) for name, value in base.state_dict().items()})
    before = {name: value.clone() for name, value in base.state_dict().items()}
    batches = [torch.randn(32, 40)]
    method = DareX(keep=0.02, scope=scope)
    expected = dtrain.compress(base, tuned, method, objective=HiddenChange(third, batches))
    shared = HiddenChange(base if which == "base" else tuned, batches)
    found = dtrain.compress(base, tuned, method, objective=shared)
    assert found.content.metadata["fit"] == expected.content.metadata["fit"]
    assert same_bits(found.state_dict(base), expected.state_dict(base))
    assert same_bits(base.state_dict(), before)
