"""The right base or no result, and the sentence names what differs."""

import pytest
import torch

import dtrain
from dtrain import BaseMismatchError, Dare, Rules
from tests.methods.settings import module_of, raw, same_bits

NAMES = ["enc.0.weight", "enc.0.bias", "enc.1.weight", "frozen", "steps", "dropped", "pooler"]


def states():
    base = {name: torch.randn(4, 3) for name in NAMES if name != "steps"} | {"steps": torch.tensor([3, 4])}
    tuned = {name: value + 1 for name, value in base.items() if name != "pooler"}
    tuned["frozen"] = base["frozen"]
    return base, tuned | {"head.weight": torch.randn(2, 3)}


@pytest.fixture
def pair():
    base, tuned = states()
    return base, dtrain.compress(base, tuned, Dare(keep=0.5), rules=Rules(drop=["dropped"]))


def flip(tensor):
    changed = tensor.clone()
    changed.view(-1).view(torch.uint8)[0] ^= 1
    return changed


CHANGES = {
    **{f"one bit of {name}": (lambda s, n=name: s.update({n: flip(s[n])}), name) for name in NAMES},
    **{f"without {name}": (lambda s, n=name: s.pop(n), name) for name in NAMES if name != "pooler"},
    "one tensor more": (lambda s: s.update(extra=torch.zeros(1)), "extra"),
    "renamed": (lambda s: s.update({"enc.2.weight": s.pop("enc.1.weight")}), "enc.1.weight"),
    "other dtype": (lambda s: s.update({"enc.0.bias": s["enc.0.bias"].double()}), "enc.0.bias"),
    "same bits as integers": (lambda s: s.update(frozen=s["frozen"].view(torch.int32)), "frozen"),
    "other shape": (lambda s: s.update(frozen=s["frozen"].view(3, 4)), "frozen"),
    "other shape of what is added to": (lambda s: s.update({"enc.0.bias": torch.zeros(5)}), "enc.0.bias"),
    "minus zero": (lambda s: s.update({"enc.0.bias": s["enc.0.bias"] * -1}), "enc.0.bias"),
}


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES.keys())
def test_another_base_is_refused_by_name(pair, change, name):
    base, delta = pair
    delta.verify(base)
    other = dict(base)
    change(other)
    head = {"head.weight": torch.zeros(2, 3)}
    for door in (delta.verify, delta.state_dict, lambda state: delta.apply_(module_of(state | head))):
        with pytest.raises(BaseMismatchError, match=f"is not the base the delta was made from: it .*'{name}'"):
            door(other)


def test_the_finetuned_model_is_not_the_base(pair):
    base, delta = pair
    with pytest.raises(BaseMismatchError, match="has other values"):
        delta.verify(delta.state_dict(base) | {"pooler": base["pooler"]})


def test_many_names_are_cut_short(pair):
    base, delta = pair
    with pytest.raises(BaseMismatchError, match=r"'dropped', 'enc.0.bias', 'enc.0.weight' and 3 more"):
        delta.verify({"pooler": base["pooler"]})


def test_what_only_the_base_has_may_be_missing(pair):
    base, delta = pair
    delta.verify({name: value for name, value in base.items() if name != "pooler"})


def test_a_compiled_model_is_the_same_base(pair):
    base, delta = pair
    delta.verify({f"_orig_mod.{name}": value for name, value in base.items()})


def test_a_fresh_head_may_differ_between_processes(pair):
    base, delta = pair
    expected = delta.state_dict(base)
    for seed in range(2):
        torch.manual_seed(seed)
        module = module_of(base | {"head.weight": torch.randn(2, 3)})
        delta.apply_(module)
        assert same_bits({name: module.state_dict()[name] for name in expected}, expected)


@pytest.mark.parametrize("head", [None, (3, 3)])
def test_a_fresh_head_must_have_a_place(pair, head):
    base, delta = pair
    module = module_of(base | ({"head.weight": torch.randn(head)} if head else {}))
    with pytest.raises(BaseMismatchError, match=r"lacks, or has other shapes for, 'head\.weight'"):
        delta.apply_(module)
    delta.verify(base)


def test_compress_and_verify_leave_their_inputs_alone():
    base, tuned = states()
    copies = [{name: value.clone() for name, value in state.items()} for state in (base, tuned)]
    dtrain.compress(base, tuned, Dare(keep=0.5)).state_dict(base)
    assert same_bits(base, copies[0])
    assert same_bits(tuned, copies[1])


def test_a_base_in_another_float_type():
    """Fine-tuning may change the dtype: the delta is of the values, the result has the fine-tuned dtype."""
    base = {"w": torch.randn(40, 30), "b": torch.randn(30)}
    tuned = {name: (value + 0.5).bfloat16() for name, value in base.items()}
    delta = dtrain.compress(base, tuned, Dare(keep=1))
    state = delta.state_dict(base)
    assert all(state[name].dtype == torch.bfloat16 for name in state)
    assert all(torch.allclose(state[name].float(), tuned[name].float(), rtol=2**-7) for name in state)
    module = module_of(base)
    delta.apply_(module)
    assert same_bits({k: v.bfloat16() for k, v in module.state_dict().items()}, state)
    delta.remove_(module)
    assert all(raw(value) == raw(base[name]) for name, value in module.state_dict().items())
