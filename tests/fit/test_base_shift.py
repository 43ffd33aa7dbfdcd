"""The two scalars of DBMS by search, against every pair of a fine grid."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import dtrain
from dtrain import (
    BitDelta,
    ClosedForm,
    DareX,
    Dbms,
    HiddenChange,
    Learn,
    Metric,
    NeedsDataError,
    Search,
    SeededSign,
)
from dtrain.methods import Shifted
from tests.methods.settings import dense


@pytest.fixture
def models():
    torch.manual_seed(0)
    base, module = (nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 5)) for _ in range(2))
    tuned = {name: value + 0.3 * torch.randn(value.shape) for name, value in base.state_dict().items()}
    return base.state_dict(), tuned, module, [torch.randn(32, 20) for _ in range(4)]


def loss_of(objective, tuned, base, delta):
    objective.module.load_state_dict(tuned)
    objective.remember()
    objective.module.load_state_dict(delta.state_dict(base))
    return objective.loss()


@pytest.mark.parametrize("host", [BitDelta(), SeededSign(keep=0.5), DareX(keep=0.25)], ids=["signs", "mask", "values"])
def test_the_search_finds_the_best_pair(models, host):
    base, tuned, module, batches = models
    split = None if isinstance(host, BitDelta) else 0.5
    objective = HiddenChange(module, batches)
    delta = dtrain.compress(base, tuned, Dbms(host, split=split), objective=objective)
    fit = delta.content.metadata["fit"]
    assert loss_of(objective, tuned, base, delta) == pytest.approx(fit["loss"], rel=1e-5)
    pairs = [
        loss_of(objective, tuned, base, dtrain.compress(base, tuned, Dbms(host, split=split, lam=lam, eta=eta)))
        for lam in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
        for eta in (0.25, 0.4, 0.55, 0.7, 0.85, 1.0, 1.15)
    ]
    assert fit["loss"] <= 1.02 * min(pairs)
    assert fit["loss"] <= fit["start"]


def test_what_is_fixed_is_not_searched(models):
    base, tuned, module, batches = models
    objective = HiddenChange(module, batches)
    seen = {}
    for name, method in {"eta only": Dbms(BitDelta(), lam=0.9), "lam only": Dbms(BitDelta(), eta=0.9)}.items():
        delta = dtrain.compress(base, tuned, method, objective=objective)
        seen[name] = delta.content.metadata["fit"]
    assert seen["eta only"]["lam"] == seen["lam only"]["eta"] == [0.9, 0.9]
    both = dtrain.compress(base, tuned, Dbms(BitDelta()), objective=objective).content.metadata["fit"]
    none = loss_of(objective, tuned, base, dtrain.compress(base, tuned, Dbms(BitDelta(), lam=1.0, eta=1.0)))
    assert both["loss"] <= min(none, both["start"])


@pytest.mark.parametrize("host", [DareX(keep=0.05), SeededSign(keep=0.05, q="search")], ids=["values", "signs"])
def test_eta_reaches_as_far_as_the_search_of_the_host(models, host):
    """A delta this large wants a q far above keep."""
    base, tuned, module, batches = models
    tuned = {name: base[name] + 5 * (value - base[name]) for name, value in tuned.items()}
    losses = [
        dtrain.compress(base, tuned, method, objective=HiddenChange(module, batches)).content.metadata["fit"]["loss"]
        for method in (replace(host, masks=1), Dbms(host, split=None, lam=0.0))
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


@pytest.mark.parametrize("fit", [Search("tensor"), Learn(steps=10)], ids=str)
def test_what_is_fixed_stays_with_every_fit(models, fit):
    base, tuned, module, batches = models
    method = Dbms(BitDelta(), lam=0.8, eta=0.9) if isinstance(fit, Search) else Dbms(BitDelta(), eta=0.9)
    delta = dtrain.compress(base, tuned, method, fit=fit, objective=HiddenChange(module, batches))
    assert delta.content.metadata["fit"]["eta"] == [0.9, 0.9]


def test_a_split_is_searched_by_an_objective(models):
    base, tuned, *_ = models
    method = Dbms(SeededSign(keep=0.5), split="search", lam=1.0)
    with pytest.raises(
        NeedsDataError, match="Dbms with ClosedForm fits scales on training inputs but got no objective"
    ):
        dtrain.compress(base, tuned, method, fit=ClosedForm("mse"))


def test_the_split_of_least_loss_is_taken(models):
    base, tuned, module, batches = models
    objective = HiddenChange(module, batches)
    found = dtrain.compress(base, tuned, Dbms(SeededSign(keep=0.5), split="search"), objective=objective)
    fixed = {
        split: dtrain.compress(base, tuned, Dbms(SeededSign(keep=0.5), split=split), objective=objective)
        for split in (0.25, 0.5, 0.75)
    }
    best = min(fixed, key=lambda split: fixed[split].content.metadata["fit"]["loss"])
    assert found.content.metadata["method"]["split"] == best
    assert found.content.metadata["fit"] == fixed[best].content.metadata["fit"]


def test_a_task_metric_will_do(models):
    base, tuned, module, batches = models
    module.load_state_dict(tuned)
    labels = [module(batch).argmax(-1) for batch in batches]

    def accuracy(model):
        return sum(float((model(x).argmax(-1) == y).float().mean()) for x, y in zip(batches, labels, strict=True))

    fit = dtrain.compress(base, tuned, Dbms(BitDelta()), objective=Metric(module, accuracy)).content.metadata["fit"]
    assert fit["loss"] <= fit["start"] <= 0


@pytest.mark.parametrize("fit", [Search("tensor"), Learn("model", steps=30), Learn(steps=30)], ids=str)
def test_codes_follow_the_shift(models, fit):
    """The residual in the file is that of the shift in the file: encoding it again from there changes nothing."""
    base, tuned, module, batches = models
    method = Dbms(BitDelta(), split=None)
    delta = dtrain.compress(base, tuned, method, fit=fit, objective=HiddenChange(module, batches))
    assert delta.content.metadata["fit"]["loss"] < delta.content.metadata["fit"]["start"]
    for record in delta.content.records:
        if len(record.payloads) == 2:
            change = tuned[record.name] - base[record.name]
            first, second = record.payloads
            plain = method.hosts[0].encode(record.name, change)[0]
            again = Dbms(BitDelta(), split=None, lam=first.scale / plain.scale, eta=1.0).encode(record.name, change)
            assert first.scale == pytest.approx(again[0].scale, rel=1e-6)
            assert float((second.data ^ again[1].data).ne(0).float().mean()) < 0.01  # signs of what is all but 0


def test_one_mask_for_both_would_leave_one_scalar(models):
    """With the same mask for b and for the residual the two scalars do what one can: hence independent masks."""
    base, tuned, *_ = models
    delta, host = tuned["0.weight"] - base["0.weight"], DareX(keep=0.5, q=1.0)
    shares = []
    for encode in (host.encode, host.reseeded(2**63).encode):
        first, second = Shifted(encode, host.encode, 0.4, 0.7).groups("w", delta)
        both, alone = dense([*first, *second], delta.shape), dense(host.encode("w", delta), delta.shape)
        shares.append((both / alone)[alone != 0])
    assert torch.allclose(shares[0], shares[0].mean(), rtol=1e-2)
    assert float(shares[1].std()) > 0.05  # 0.7 where only the residual has a value, 0.82 where both have
