"""Learned scales: gradients against finite differences, and the promises of every fit."""

import math

import pytest
import torch
from torch import nn

import dtrain
from dtrain import (
    BitDelta,
    Dare,
    DareX,
    Dbms,
    HiddenChange,
    InputError,
    Learn,
    LogitChange,
    Magnitude,
    Metric,
    NeedsDataError,
    Search,
    SeededSign,
)
from dtrain.artifact import pack_file
from dtrain.rules import Rules
from tests.methods.settings import same_bits

ROWS = {"Dare float16": Dare(keep=0.3), "BitDelta": BitDelta(), "SeededSign": SeededSign(keep=0.25)}
METHODS = ROWS | {
    "DareX": DareX(keep=0.1),
    "Magnitude": Magnitude(keep=0.2),
    "Dbms": Dbms(SeededSign(keep=0.5)),
    "Dbms eta": Dbms(BitDelta(), split=None, lam=1.0),
}


def network():
    return nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.fixture
def pair_of_models():
    torch.manual_seed(0)
    base, module = network(), network()
    tuned = {name: value + 0.2 * torch.randn(value.shape) for name, value in base.state_dict().items()}
    return base.state_dict(), tuned, module, [torch.randn(16, 12) for _ in range(4)]


def problem_of(method, base, tuned, objective, draws=1):
    """Return the problem that `compress` makes of these."""
    made = []

    class Stop(Exception):
        pass

    class Catch(Learn):
        def run(self, problem):
            made.append(problem)
            raise Stop

    fit = Catch(masks=draws)
    with pytest.raises(Stop):
        dtrain.compress(base, tuned, method, fit=fit, objective=objective)
    return made[0]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("objective", ["mse", "kl", "top"])
def test_the_gradient_is_that_of_finite_differences(pair_of_models, method, objective):
    base, tuned, module, batches = (part for part in pair_of_models)
    module.double()
    base, tuned = ({name: value.double() for name, value in state.items()} for state in (base, tuned))
    change = LogitChange(module, [batch.double() for batch in batches], measure=objective, top=2)
    problem = problem_of(method, base, tuned, change)
    with problem:
        x = {name: value + 0.1 for name, value in problem.constant(*[0.0] * problem.groups).items()}
        problem.evaluate(x)  # codes of a residual follow, and then stay
        _, found = problem.gradient(x, 1)
        for name, value in x.items():
            for index in range(len(value)):
                step = 1e-3
                sides = []
                for sign in (1, -1):
                    moved = {**x, name: value.clone()}
                    moved[name][index] += sign * step
                    problem._write(problem._masks[0], moved)
                    sides.append(float(change.batch_loss(1)))
                expected = (sides[0] - sides[1]) / (2 * step)
                assert float(found[name][index, 0]) == pytest.approx(expected, rel=2e-2, abs=1e-5)


def test_the_gradient_of_rows_sums_up_to_that_of_the_tensor(pair_of_models):
    base, tuned, module, batches = pair_of_models
    problem = problem_of(Dare(keep=0.5), base, tuned, LogitChange(module, batches))
    with problem:
        x = problem.start()
        rows = {name: value.expand(-1, len(tuned[name])).contiguous() for name, value in x.items()}
        (loss, whole), (same, found) = problem.gradient(x, 0), problem.gradient(rows, 0)
    assert loss == pytest.approx(same, rel=1e-6)
    for name, value in whole.items():
        assert float(found[name].sum()) == pytest.approx(float(value), rel=1e-4, abs=1e-7)
        assert found[name].shape == (1, len(tuned[name]))


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("per", ["model", "tensor"])
def test_learnt_scales_lower_the_objective_and_the_summary_says_how_far(pair_of_models, method, per):
    base, tuned, module, batches = pair_of_models
    objective = LogitChange(module, batches)
    delta = dtrain.compress(base, tuned, method, fit=Learn(per, steps=40), objective=objective)
    fit = delta.content.metadata["fit"]
    assert fit["kept"] == "fit"
    assert fit["loss"] < fit["start"] or (per == "model" and fit["loss"] == fit["start"])  # one may be right already
    assert fit["held_out"][1] <= fit["held_out"][0]
    module.load_state_dict(tuned)
    objective.remember()
    module.load_state_dict(delta.state_dict(base))
    assert objective.loss() == pytest.approx(fit["loss"], rel=1e-4)


@pytest.mark.parametrize("method", ROWS.values(), ids=ROWS)
def test_rows_have_scales_of_their_own(pair_of_models, method):
    base, tuned, module, batches = pair_of_models
    objective = LogitChange(module, batches)
    delta = dtrain.compress(base, tuned, method, fit=Learn("row", steps=40), objective=objective)
    fit = delta.content.metadata["fit"]
    assert (fit["kept"], fit["per"]) == ("fit", "row")
    assert fit["loss"] < fit["start"]
    plain = dtrain.compress(base, tuned, method).state_dict(base)
    fitted = delta.state_dict(base)
    ratio = (fitted["0.weight"] - base["0.weight"]).norm(dim=1) / (plain["0.weight"] - base["0.weight"]).norm(dim=1)
    assert len(ratio[ratio.isfinite()].round(decimals=3).unique()) > 10
    module.load_state_dict(tuned)
    objective.remember()
    module.load_state_dict(fitted)
    assert objective.loss() == pytest.approx(fit["loss"], rel=1e-4)


def test_more_scales_fit_better(pair_of_models):
    base, tuned, module, batches = pair_of_models
    losses = []
    for per in ("model", "tensor", "row"):
        fit = Learn(per, steps=300, patience=300, held_out=0.3)
        delta = dtrain.compress(base, tuned, Dare(keep=0.5), fit=fit, objective=LogitChange(module, [batches[0]] * 4))
        losses.append(delta.content.metadata["fit"]["loss"])
    assert losses == sorted(losses, reverse=True)
    assert losses[2] < 0.8 * losses[0]


@pytest.mark.parametrize("fit", [Learn(steps=20), Learn(steps=20, masks=2), Search(), Search("tensor")], ids=str)
@pytest.mark.parametrize("method", [SeededSign(keep=0.25), Dbms(Dare(keep=0.2))], ids=["one scale", "two"])
def test_a_fit_can_be_repeated_and_leaves_the_module_as_it_was(pair_of_models, method, fit):
    base, tuned, module, batches = pair_of_models
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    state = torch.get_rng_state()
    files = [
        list(map(bytes, pack_file(dtrain.compress(base, tuned, method, fit=fit, objective=change).content)))
        for change in (HiddenChange(module, batches), HiddenChange(module, batches))
    ]
    assert files[0] == files[1]
    assert same_bits(module.state_dict(), before)
    assert module.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())


def test_a_fit_that_fails_restores_the_module(pair_of_models):
    base, tuned, module, batches = pair_of_models
    before = {name: value.clone() for name, value in module.state_dict().items()}
    calls = []

    class Breaks(LogitChange):
        def batch_loss(self, index, tensors=None):
            calls.append(tensors is None)
            if tensors is not None:
                raise RuntimeError("out of memory")
            return super().batch_loss(index, tensors)

    with pytest.raises(RuntimeError, match="out of memory"):
        dtrain.compress(base, tuned, BitDelta(), fit=Learn(), objective=Breaks(module, batches))
    assert calls
    assert same_bits(module.state_dict(), before)


class Worse(LogitChange):
    """What is learnt from says the opposite of what counts."""

    def batch_loss(self, index, tensors=None):
        loss = super().batch_loss(index, tensors)
        return loss if tensors is None else -loss


@pytest.mark.parametrize("method", [BitDelta(), Dbms(BitDelta(), split=None)], ids=["one", "two"])
def test_a_fit_is_never_worse_than_its_start(pair_of_models, method):
    base, tuned, module, batches = pair_of_models
    for fit in (Learn(steps=30), Learn("model", steps=30)):
        delta = dtrain.compress(base, tuned, method, fit=fit, objective=Worse(module, batches))
        summary = delta.content.metadata["fit"]
        assert summary["loss"] <= summary["start"]
        assert summary["held_out"][1] <= summary["held_out"][0]


def test_the_start_is_kept_where_the_rest_of_the_inputs_disagrees(pair_of_models):
    """Held-out inputs like the fit, all inputs together do not: the summary says that the start was kept."""
    base, tuned, module, batches = pair_of_models

    class Disagrees(LogitChange):
        def loss(self):
            weight = self.module.state_dict()["0.weight"]
            start = plain["0.weight"]
            return float((weight - start).abs().max())

    plain = dtrain.compress(base, tuned, BitDelta()).state_dict(base)
    delta = dtrain.compress(base, tuned, BitDelta(), fit=Learn(steps=20), objective=Disagrees(module, batches))
    fit = delta.content.metadata["fit"]
    assert fit["kept"] == "start"
    assert fit["factors"] == [1.0, 1.0]
    assert same_bits(delta.state_dict(base), plain)


def test_what_is_fixed_stays(pair_of_models):
    base, tuned, module, batches = pair_of_models
    found = {}
    for name, method in {"lam": Dbms(BitDelta(), eta=0.5), "eta": Dbms(BitDelta(), lam=0.5)}.items():
        delta = dtrain.compress(base, tuned, method, fit=Learn(patience=20), objective=LogitChange(module, batches))
        found[name] = delta.content.metadata["fit"]
    assert found["lam"]["eta"] == [0.5, 0.5]
    assert found["lam"]["lam"] != [1.0, 1.0]
    assert found["eta"]["lam"] == [0.5, 0.5]
    assert found["eta"]["eta"] != [1.0, 1.0]


def test_patience_ends_learning(pair_of_models):
    base, tuned, module, batches = pair_of_models
    fit = Learn(steps=400, every=5, patience=2)
    delta = dtrain.compress(base, tuned, SeededSign(keep=0.25), fit=fit, objective=Worse(module, batches))
    assert delta.content.metadata["fit"]["steps"] < 200


def test_whoever_watches_sees_every_step(pair_of_models):
    base, tuned, module, batches = pair_of_models
    seen = []
    dtrain.compress(
        base,
        tuned,
        BitDelta(),
        fit=Learn(steps=12, patience=9),
        objective=LogitChange(module, batches),
        watch=lambda number, loss: seen.append((number, loss)),
    )
    assert [number for number, _ in seen][1:13] == list(range(1, 13))
    assert all(math.isfinite(loss) for _, loss in seen)


class Tied(nn.Module):
    """An embedding that is its own output layer, a frozen layer, and a norm."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16)
        self.body = nn.Linear(16, 16).requires_grad_(False)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, attention_mask=None):
        return {"logits": self.head(self.norm(self.body(self.table(ids))))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_and_frozen_weights_in_any_dtype(dtype):
    torch.manual_seed(0)
    module, base = Tied().to(dtype), Tied().to(dtype)
    tuned = {name: value + (0.3 * torch.randn(value.shape)).to(dtype) for name, value in base.state_dict().items()}
    tuned["head.weight"] = tuned["table.weight"]
    batches = [{"ids": torch.randint(0, 30, (4, 7)), "attention_mask": torch.ones(4, 7)} for _ in range(4)]
    rules = Rules(whole=(), embeddings=())
    delta = dtrain.compress(
        base, tuned, BitDelta(), fit=Learn(steps=30), objective=LogitChange(module, batches), rules=rules
    )
    fit = delta.content.metadata["fit"]
    assert fit["loss"] < fit["start"]
    assert len({record.name for record in delta.content.records if len(record.shape) == 2}) == 2
    assert not module.body.weight.requires_grad


@pytest.mark.parametrize(
    ("objective", "method", "fit", "error", "message"),
    [
        (
            lambda m, b: Metric(m, lambda _: 0.0),
            BitDelta(),
            Learn(),
            InputError,
            "learnt by gradient, and Metric has none",
        ),
        (lambda m, b: LogitChange(m, b[:1]), BitDelta(), Learn(), InputError, "stops by others, and got one"),
        (lambda m, b: None, BitDelta(), Learn(), NeedsDataError, "BitDelta with Learn fits scales on training inputs"),
        (
            lambda m, b: LogitChange(m, b),
            BitDelta("column"),
            Learn("row"),
            InputError,
            "rows of Sign values behind Tran",
        ),
        (lambda m, b: LogitChange(m, b), Dbms(), Learn("row"), InputError, "scales of rows belong to one mask"),
        (lambda m, b: LogitChange(m, b), dtrain.Lossless(), Learn(), InputError, "Lossless has no scales"),
        (lambda m, b: LogitChange(m, b), BitDelta(), "learn", InputError, "`fit` must be a fit such as"),
    ],
    ids=["metric", "one batch", "no objective", "column scales", "rows of two", "bitwise", "a word"],
)
def test_what_cannot_be_learnt_is_a_sentence(pair_of_models, objective, method, fit, error, message):
    base, tuned, module, batches = pair_of_models
    with pytest.raises(error, match=message):
        dtrain.compress(base, tuned, method, fit=fit, objective=objective(module, batches))


def test_rows_of_several_masks_are_a_sentence(pair_of_models):
    base, tuned, module, batches = pair_of_models
    objective = LogitChange(module, batches)
    with pytest.raises(InputError, match="scales of rows belong to one mask"):
        dtrain.compress(base, tuned, Dare(keep=0.3), fit=Learn("row", masks=2), objective=objective)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_derivatives_do_not_vanish_in_sixteen_bits(dtype):
    """Of a mean over many logits they are far below what half precision can hold."""
    torch.manual_seed(0)
    base, module = (nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3000)) for _ in range(2))
    tuned = {name: value + 0.05 * torch.randn(value.shape) for name, value in base.state_dict().items()}
    batch, found = torch.randn(256, 16), {}
    for kind in (torch.float32, dtype):
        states = [{name: value.to(kind) for name, value in state.items()} for state in (base.state_dict(), tuned)]
        problem = problem_of(BitDelta(), *states, LogitChange(module.to(kind), [batch.to(kind)] * 2))
        with problem:
            _, gradient = problem.gradient({name: value - 0.5 for name, value in problem.start().items()}, 0)
        found[kind] = torch.cat([gradient[name].reshape(-1) for name in ("0.weight", "1.weight")])
    assert torch.allclose(found[dtype], found[torch.float32], rtol=0.1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_learning_does_not_mind_where_it_is_called(pair_of_models, context):
    base, tuned, module, batches = pair_of_models
    with context():
        objective = LogitChange(module, batches)
        fit = dtrain.compress(base, tuned, BitDelta(), fit=Learn(steps=20), objective=objective).content.metadata["fit"]
    assert fit["loss"] < fit["start"]


def test_an_objective_without_the_tensors_is_a_sentence(pair_of_models):
    base, tuned, module, batches = pair_of_models
    objective = LogitChange(module, batches, lambda module, batch: batch)
    with pytest.raises(InputError, match="does not depend on the compressed tensors"):
        dtrain.compress(base, tuned, BitDelta(), fit=Learn(), objective=objective)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per": "layer"}, "`per` must be 'model' or 'tensor' or 'row', got 'layer'"),
        ({"steps": 0}, "`steps` must be at least 1, got 0"),
        ({"steps": 1.5}, "`steps` must be an integer"),
        ({"lr": 0.0}, r"`lr` must be in \(0, 1\]"),
        ({"held_out": 1.0}, r"`held_out` in \(0, 1\)"),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(InputError, match=message):
        Learn(**arguments)
