"""Which tensor of one model belongs to which of another, and what becomes of it."""

import math

import pytest
import torch
from torch import nn

import dtrain
from dtrain import Dare, InputError, Lossless, Rules
from dtrain.difference import pair
from dtrain.weights import read_weights
from tests.methods.settings import raw, same_bits


def roles(base, tuned, **rules):
    return {c.name: c.role for c in pair(read_weights(base), read_weights(tuned), Rules(**rules))}


def model(**changes):
    torch.manual_seed(1)
    state = {"emb.weight": torch.randn(10, 4), "enc.weight": torch.randn(4, 4), "enc.bias": torch.zeros(4)}
    return {name: value for name, value in (state | changes).items() if value is not None}


def moved(state):
    return {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}


def test_roles():
    base = model(**{"bn.steps": torch.tensor(1), "same": torch.ones(3, 3), "gone": torch.ones(2)})
    base |= {"old.weight": torch.ones(3)}
    tuned = moved(base) | {"bn.steps": torch.tensor(2), "same": torch.ones(3, 3), "old.weight": torch.ones(4)}
    tuned |= {"head.weight": torch.ones(2, 4), "new.weight": torch.ones(5, 5)}
    del tuned["gone"]
    assert roles(base, tuned, drop=["enc.bias"]) == {
        "bn.steps": "bits", "emb.weight": "method", "enc.bias": "drop", "enc.weight": "method", "gone": "base_only",
        "head.weight": "whole", "new.weight": "whole", "old.weight": "whole", "same": "same",
    }  # fmt: skip


def test_names_are_in_the_order_of_their_bytes():
    base = {name: torch.zeros(1) for name in ["b", "a", "B", "é", "z", "10", "9", "\U0001f600", "\uffff"]}
    names = list(roles(base, {name: value + 1 for name, value in base.items()}))
    assert names == sorted(base, key=str.encode)


@pytest.mark.parametrize("method", [Dare(keep=0.5), Lossless()], ids=repr)
def test_a_fresh_head_and_a_grown_vocabulary_are_stored_whole(method):
    base = model(**{"head.weight": torch.randn(3, 4)})
    tuned = moved(base) | {"emb.weight": torch.randn(12, 4), "head.weight": torch.randn(3, 4)}
    delta = dtrain.compress(base, tuned, method, rules=Rules(fresh="exact"))
    assert set(delta.report().whole) == {"emb.weight", "head.weight"}
    for other in (base | {"head.weight": torch.zeros(5, 4)}, base | {"emb.weight": torch.ones(10, 4)}):
        state = delta.state_dict(other)  # neither tensor is part of the base's fingerprint
        assert raw(state["emb.weight"]) == raw(tuned["emb.weight"])
        assert raw(state["head.weight"]) == raw(tuned["head.weight"])
    smaller = {name: value for name, value in base.items() if name != "head.weight"}
    assert same_bits(delta.state_dict(smaller), delta.state_dict(base))


def test_what_only_the_base_has_is_left_out():
    base = model(pooler=torch.ones(3, 3))
    delta = dtrain.compress(base, moved(model()), Dare(keep=0.5))
    assert delta.report().base_only == ("pooler",)
    assert delta.state_dict(base).keys() == model().keys()


@pytest.mark.parametrize("tuned", [model(), model(**{"emb.weight": None})], ids=["equal", "a part"])
def test_no_difference_is_refused(tuned):
    with pytest.raises(InputError, match=r"equals its base .* there is no delta"):
        dtrain.compress(model(), tuned, Dare())


def test_one_bit_is_a_difference():
    assert roles(model(), model(**{"enc.bias": -torch.zeros(4)}))["enc.bias"] == "vector"


def test_equal_nan_is_no_difference():
    state = {"w": torch.full((2, 2), math.nan), "v": torch.zeros(2)}
    assert roles(state, state | {"v": torch.ones(2)}) == {"v": "half", "w": "same"}


@pytest.mark.parametrize(
    "tuned",
    [{"other": torch.ones(3)}, {name: torch.ones(7) for name in model()}, {k: v.long() for k, v in model().items()}],
    ids=["names", "shapes", "dtypes"],
)
def test_another_model_is_refused(tuned):
    with pytest.raises(InputError, match=r"no tensor of .* fits one of .* by name and shape"):
        dtrain.compress(model(), tuned, Dare())


@pytest.mark.parametrize("prefix", ["model.", "net.backbone.", "_orig_mod.model."])
def test_a_prefix_is_taken_off(prefix):
    tuned = {prefix + name: value for name, value in moved(model()).items()} | {"loss.weight": torch.ones(2)}
    delta = dtrain.compress(model(), tuned, Dare(keep=1))
    assert delta.report().whole == ("loss.weight",)
    assert delta.state_dict(model()).keys() == model().keys() | {"loss.weight"}
    without = dtrain.compress(model(), tuned, Dare(keep=1), rules=Rules(drop=["loss.*"]))
    assert without.state_dict(model()).keys() == model().keys()


def test_a_fresh_head_beside_the_prefix_is_kept_even_if_the_base_has_one():
    base = model() | {"classifier.weight": torch.ones(2, 4)}
    tuned = {f"bert.{name}": value for name, value in moved(model()).items()} | {"classifier.weight": torch.zeros(2, 4)}
    found = roles(base, tuned)
    assert found["classifier.weight"] == "whole"
    assert "method" in found.values()


def test_a_head_alone_does_not_make_a_delta():
    base = {"body.weight": torch.ones(4, 4), "head.weight": torch.ones(2, 4)}
    with pytest.raises(InputError, match="there is no delta"):
        dtrain.compress(base, {name: tensor.clone() for name, tensor in base.items()}, Dare())


def test_dropping_all_that_changed_is_refused():
    with pytest.raises(InputError, match="nothing is left"):
        dtrain.compress(model(), moved(model()), Dare(), rules=Rules(drop=["*"]))


def test_a_prefix_is_found_whatever_the_names():
    """The base's first name may end others of its names, or be missing from the fine-tuned model."""
    base = {"bias": torch.zeros(3), "body.bias": torch.zeros(4), "body.weight": torch.zeros(4, 4)}
    tuned = {f"model.{name}": value + 1 for name, value in base.items()}
    assert set(roles(base, tuned)) == set(base)
    del tuned["model.bias"]
    assert roles(base, tuned) == {"bias": "base_only", "body.bias": "vector", "body.weight": "method"}


def tied(untied=False):
    root = nn.Module()
    root.emb, root.lm = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    if not untied:
        root.lm.weight = root.emb.weight
    return root


def test_ties_are_stored_once():
    base, tuned = tied(), tied()
    delta = dtrain.compress(base, tuned, Dare(keep=1))
    assert [record.name for record in delta.content.records] == ["emb.weight"]
    state = delta.state_dict(base)
    assert state["lm.weight"] is state["emb.weight"]
    delta.apply_(base)
    assert base.lm.weight is base.emb.weight


@pytest.mark.parametrize("name", ["emb.weight", "lm.weight"])
def test_a_file_keeps_one_name_of_a_tie(name):
    """safetensors files of tied models hold the tensor under one of its names, whichever the library chose."""
    base, tuned = tied(), tied()
    state = {name: base.emb.weight.detach().clone()}
    delta = dtrain.compress(state, tuned, Dare(keep=1))
    assert not delta.report().whole
    delta.verify(state)
    delta.verify(base)
    (merged,) = {value.data_ptr(): value for value in delta.state_dict(base).values()}.values()
    assert torch.allclose(merged, tuned.emb.weight, atol=1e-3)
    delta.apply_(base)
    assert torch.equal(base.emb.weight, merged)


@pytest.mark.parametrize("untied", ["base", "tuned"])
def test_ties_on_one_side_only(untied):
    base, tuned = tied(untied == "base"), tied(untied == "tuned")
    if untied == "base":
        base.lm.weight.data.copy_(base.emb.weight)
    delta = dtrain.compress(base, tuned, Dare(keep=1))
    state = delta.state_dict(base)
    for name, value in tuned.state_dict().items():
        assert torch.allclose(state[name], value, atol=1e-3), name


def test_whole_by_rule_and_missing_in_the_base_are_one_thing():
    base, tuned = model(), moved(model())
    by_rule = dtrain.compress(base, tuned, Dare(), rules=Rules(whole=["enc.*"], fresh="exact"))
    smaller = model(**{"enc.weight": None, "enc.bias": None})
    missing = dtrain.compress(smaller, tuned, Dare(), rules=Rules(fresh="exact"))
    for delta in (by_rule, missing):
        assert delta.report().whole == ("enc.bias", "enc.weight")
        assert raw(delta.state_dict(base)["enc.weight"]) == raw(tuned["enc.weight"])


def test_lossless_wants_one_dtype():
    with pytest.raises(InputError, match=r"'w' is torch.float32 in the base and torch.bfloat16"):
        dtrain.compress({"w": torch.zeros(2)}, {"w": torch.ones(2).bfloat16()}, Lossless())


def test_prefix_keeps_a_tied_tensor_whose_first_name_lies_outside():
    w, changed = torch.randn(4, 4), torch.randn(4, 4)
    base = read_weights({"lm.weight": w, "lm.b": torch.zeros(4)})
    tuned = read_weights({"a.weight": changed, "model.lm.weight": changed, "model.lm.b": torch.zeros(4)})
    roles = {change.name: change.role for change in pair(base, tuned, Rules())}
    assert roles == {"lm.weight": "method", "lm.b": "same"}
