"""Promise 5: the right base or no result, and the sentence names what differs and what to do."""

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain import BaseMismatchError, Dare, Rules
from dtrain.cli import main
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
    "behind a prefix": (lambda s: s.update({"model.enc.1.weight": s.pop("enc.1.weight")}), "enc.1.weight"),
    "two exchanged": (lambda s: s.update(dropped=s["pooler"], pooler=s["dropped"]), "dropped"),
    "transposed": (lambda s: s.update({"enc.0.weight": s["enc.0.weight"].t().contiguous()}), "enc.0.weight"),
    "other dtype": (lambda s: s.update({"enc.0.bias": s["enc.0.bias"].double()}), "enc.0.bias"),
    "same bits as integers": (lambda s: s.update(frozen=s["frozen"].view(torch.int32)), "frozen"),
    "other shape": (lambda s: s.update(frozen=s["frozen"].view(3, 4)), "frozen"),
    "other shape of what is added to": (lambda s: s.update({"enc.0.bias": torch.zeros(5)}), "enc.0.bias"),
    "minus zero": (lambda s: s.update({"enc.0.bias": s["enc.0.bias"] * -1}), "enc.0.bias"),
}


ADVICE = "Give the model exactly as it was before fine-tuning"


@pytest.mark.parametrize(("change", "name"), CHANGES.values(), ids=CHANGES.keys())
def test_another_base_is_refused_by_name(pair, change, name, tmp_path, capsys):
    """By every door: those of a delta in memory and of its file, and by the commands."""
    base, delta = pair
    delta.save(tmp_path / "delta")
    loaded = dtrain.load(tmp_path / "delta")
    loaded.verify(base)
    other = dict(base)
    change(other)
    head = {"head.weight": torch.zeros(2, 3)}
    module = module_of(other | head)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    refusal = rf"is not the base the delta was made from: it .*'{name}'.*{ADVICE}"
    for door in (delta.verify, loaded.verify, loaded.state_dict):
        with pytest.raises(BaseMismatchError, match=refusal):
            door(other)
    for one in (delta, loaded):
        with pytest.raises(BaseMismatchError, match=refusal):
            one.apply_(module)
        assert same_bits(module.state_dict(), before)
    save_file(other, tmp_path / "other.safetensors")
    for command, *out in (("verify",), ("apply", str(tmp_path / "out.safetensors"))):
        assert main([command, str(tmp_path / "other.safetensors"), str(tmp_path / "delta"), *out]) == 1
        said = capsys.readouterr().err
        assert "other.safetensors is not the base the delta was made from: it" in said
        assert f"'{name}'" in said
        assert ADVICE in said
    assert not (tmp_path / "out.safetensors").exists()


BITS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_any_one_bit_of_any_dtype(dtype):
    """Of a tensor that did not change, so that only its digest speaks for it."""
    data = bytearray(8 if dtype == torch.bool else 64)
    base = {"changed": torch.zeros(2), "kept": torch.frombuffer(data, dtype=dtype)}
    delta = dtrain.compress(base, {"changed": torch.ones(2), "kept": base["kept"].clone()}, Dare(keep=1))
    for place in range(8 * len(data)):
        if dtype == torch.bool and place % 8:
            continue  # a byte of a bool is 0 or 1
        data[place // 8] ^= 1 << place % 8
        with pytest.raises(BaseMismatchError, match="has other values or another dtype in 'kept'"):
            delta.verify(base)
        data[place // 8] ^= 1 << place % 8
    delta.verify(base)


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
