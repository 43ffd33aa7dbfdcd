"""Promise 6: lossless where promised. What is exact is exact in bits, and a base comes back bit for bit.

Of every method, in every dtype and layout: `test_apply_equals_state_dict_and_remove_restores` in
`tests/methods/test_methods.py`.
"""

import copy
import gc
import math
import weakref
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dtrain
from dtrain import AppliedStateError, BaseMismatchError, Dare, Lossless, Rules
from dtrain.artifact import unpack_file
from dtrain.runtime import inplace
from tests.artifact import reference_decoder
from tests.methods.settings import bytes_of, compress_zoo, module_of, raw, same_bits, zoo

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Bit patterns that arithmetic does not keep apart, or does not keep: by dtype, of either sign.
SPECIAL = {
    torch.float32: (0x00000000, 0x00000001, 0x007FFFFF, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC12345, 0x7FFFFFFF),
    torch.float16: (0x0000, 0x0001, 0x03FF, 0x7BFF, 0x7C00, 0x7C01, 0x7E55, 0x7FFF),
    torch.bfloat16: (0x0000, 0x0001, 0x007F, 0x7F7F, 0x7F80, 0x7F81, 0x7FD5, 0x7FFF),
}  # zero, least and greatest subnormal, greatest number, infinity, signalling and quiet NaN with a payload
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1) if tensor.ndim else tensor,
    "sliced": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
}


@st.composite
def tensors(draw, shape, dtype):
    """Any bits at all, in any layout."""
    width = 8 * dtype.itemsize
    special = [bits | sign << (width - 1) for bits in SPECIAL[dtype] for sign in (0, 1)]
    patterns = st.sampled_from(special) | st.integers(0, 2**width - 1)
    bits = draw(st.lists(patterns, min_size=math.prod(shape), max_size=math.prod(shape)))
    data = b"".join(value.to_bytes(dtype.itemsize, "little") for value in bits)
    flat = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](flat.view(shape))


@st.composite
def pairs(draw):
    """A base and its fine-tune; two names may be one tensor."""
    dtype = draw(st.sampled_from(DTYPES))
    shapes = draw(st.lists(st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3))
    states = [{f"{i}.w": draw(tensors(shape, dtype)) for i, shape in enumerate(shapes)} for _ in range(2)]
    tied = draw(st.booleans()) and math.prod(shapes[0]) > 0  # without memory nothing can be shared
    for number, state in enumerate(states):
        state["changed"] = torch.tensor(number)  # models that are equal have no delta
        state |= {"tied": state["0.w"]} if tied else {}
    return states


@given(pairs())
def test_any_bits_survive(states):
    base, tuned = states
    written = bytes_of(dtrain.compress(base, tuned, Lossless()))
    delta = dtrain.Delta(unpack_file(written))
    assert bytes_of(delta) == written
    state = delta.state_dict(base)
    assert same_bits(state, tuned)
    for name, record in reference_decoder.parse(written).records.items():
        assert reference_decoder.rebuild(record, raw(base[name])) == raw(tuned[name])
    module = module_of(base)
    before = snapshot(module)
    delta.apply_(module)
    assert same_bits(snapshot(module), tuned)
    delta.remove_(module)
    assert same_bits(snapshot(module), before)


@given(st.data(), st.sampled_from(DTYPES))
def test_what_a_lossy_method_must_not_touch_survives(data, dtype):
    """Tensors that did not change, that are no floats, and fresh ones that are to be exact."""
    kept, head = (data.draw(tensors(shape, dtype)) for shape in ((2, 3), (3, 2)))
    head = torch.where(head.isfinite(), head, torch.zeros((), dtype=dtype))  # a fresh tensor of NaN is a mistake
    base = {"w": torch.zeros(4, 3), "kept": kept, "steps": torch.tensor([1, -5])}
    tuned = {"w": torch.ones(4, 3), "kept": kept.clone(), "steps": torch.tensor([2**62, -(2**63)]), "head": head}
    delta = dtrain.compress(base, tuned, Dare(keep=0.5), rules=Rules(whole=["head"], fresh="exact"))
    state = dtrain.Delta(unpack_file(bytes_of(delta))).state_dict(base)
    assert all(raw(state[name]) == raw(tuned[name]) for name in ("kept", "steps", "head"))


methods = pytest.mark.parametrize("method", [Dare(keep=0.3), Dare(keep=1), Lossless()], ids=repr)


def live(method=None):
    """Return (delta, module at the base with some head, a copy of what the module holds)."""
    base, tuned, delta = compress_zoo(method or Dare(keep=0.3))
    module = module_of(base | {name: torch.randn(value.shape) for name, value in tuned.items() if "head" in name})
    return delta, module, snapshot(module)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def few(method):
    """Return the same of few tensors: a float32 matrix, one that is not contiguous, 16 bits, a tie, whole numbers."""
    names = ("matrix", "transposed", "bf16", "tied.a", "tied.b", "steps", "head.weight")
    base, tuned = ({name: value for name, value in state.items() if name in names} for state in zoo())
    delta = dtrain.compress(base, tuned, method, rules=Rules(whole=["head.*"]))
    module = module_of(base | {"head.weight": torch.randn(tuned["head.weight"].shape)})
    return delta, module, snapshot(module)


@methods
def test_tensors_stay_what_they_are(method):
    delta, module, _ = live(method)
    before = {name: (p.data_ptr(), p.stride(), p.requires_grad) for name, p in module.named_parameters()}
    delta.apply_(module)
    delta.remove_(module)
    assert {name: (p.data_ptr(), p.stride(), p.requires_grad) for name, p in module.named_parameters()} == before


@methods
def test_again_and_again(method):
    delta, module, before = live(method)
    states = []
    for _ in range(3):
        delta.apply_(module)
        states.append(snapshot(module))
        delta.remove_(module)
        assert same_bits(snapshot(module), before)
    assert same_bits(states[0], states[2])


def test_a_second_apply_is_refused():
    delta, module, _ = live()
    delta.apply_(module)
    applied = snapshot(module)
    other = compress_zoo(Lossless())[2]
    for again in (delta, other):
        with pytest.raises(AppliedStateError, match=r"carries a delta already.*remove_\(\)"):
            again.apply_(module)
    assert same_bits(snapshot(module), applied)
    with pytest.raises(AppliedStateError, match="not applied"):
        other.remove_(module)
    delta.remove_(module)


def test_remove_without_apply_is_refused():
    delta, module, before = live()
    with pytest.raises(AppliedStateError, match=r"not applied to the module.*apply_\(\)"):
        delta.remove_(module)
    delta.apply_(module)
    with pytest.raises(AppliedStateError, match="not applied"):
        delta.remove_(copy.deepcopy(module))
    delta.remove_(module)
    with pytest.raises(AppliedStateError, match="not applied"):
        delta.remove_(module)
    assert same_bits(snapshot(module), before)


@methods
@pytest.mark.parametrize("name", ["matrix", "transposed", "steps", "head.bias"])
def test_weights_that_changed_since_are_refused(method, name):
    delta, module, _ = live(method)
    delta.apply_(module)
    with torch.no_grad():
        module.state_dict()[name].add_(1)
    changed = snapshot(module)
    with pytest.raises(AppliedStateError, match=f"'{name}' changed since"):
        delta.remove_(module)
    assert same_bits(snapshot(module), changed)


@methods
def test_nan_written_by_the_delta_can_be_taken_off(method):
    base, tuned = {"w": torch.full((4, 4), 6e4).half()}, {"w": torch.full((4, 4), 6.5e4).half()}
    delta = dtrain.compress(base, tuned, method)
    module = module_of(base)
    delta.apply_(module)  # Dare overflows float16 to infinity here; what was there comes back all the same
    delta.remove_(module)
    assert raw(module.w) == raw(base["w"])


class Broken(Exception):
    pass


@contextmanager
def broken(name, *numbers, error=Broken, after=False):
    """Raise at some calls of a function of `inplace`, before or after its work."""
    original, calls = getattr(inplace, name), []

    def call(*arguments, **options):
        calls.append(name)
        result = original(*arguments, **options) if after or len(calls) not in numbers else None
        if len(calls) in numbers:
            raise error
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inplace, name, call)
        yield calls


#: What is raised before a step has done its work, and what after it.
ERRORS = ((Broken, False), (KeyboardInterrupt, True))
two_methods = pytest.mark.parametrize("method", [Dare(keep=0.3), Lossless()], ids=repr)


@two_methods
@pytest.mark.parametrize("name", ["write", "_read", "_touched", "patch", "check_base"])
def test_a_failure_anywhere_in_apply_restores_everything(method, name):
    """At the first tensor, the second, ..., the last: before the step and after it."""
    delta, module, before = few(method)
    with broken(name) as calls:
        delta.apply_(module)
    delta.remove_(module)
    assert len(calls) >= (1 if name == "check_base" else 6)
    for number in range(1, len(calls) + 1):
        for error, after in ERRORS:
            with broken(name, number, error=error, after=after), pytest.raises(error):
                delta.apply_(module)
            assert same_bits(snapshot(module), before), (number, after)
            with pytest.raises(AppliedStateError, match="not applied"):
                delta.remove_(module)
    delta.apply_(module)
    delta.remove_(module)
    assert same_bits(snapshot(module), before)


@two_methods
def test_a_failure_anywhere_in_remove_is_mended_by_a_second_call(method):
    delta, module, before = few(method)
    delta.apply_(module)
    applied = snapshot(module)
    with broken("write") as calls:
        delta.remove_(module)
    for name in ("_touched", "write"):
        for number in range(1, len(calls) + 1):
            for error, after in ERRORS:
                delta.apply_(module)
                with broken(name, number, error=error, after=after), pytest.raises(error):
                    delta.remove_(module)
                assert name == "write" or same_bits(snapshot(module), applied)
                with pytest.raises(AppliedStateError, match="carries a delta already"):
                    delta.apply_(module)
                delta.remove_(module)
                assert same_bits(snapshot(module), before), (name, number, after)


@methods
def test_an_interrupt_on_the_way_back_is_mended_by_remove(method):
    """Ctrl-C while weights are written, and again while they are put back."""
    delta, module, before = few(method)
    with broken("write", 3, 5, error=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        delta.apply_(module)
    assert not same_bits(snapshot(module), before)
    with pytest.raises(AppliedStateError, match=r"carries a delta already.*remove_\(\)"):
        delta.apply_(module)
    delta.remove_(module)
    assert same_bits(snapshot(module), before)


@methods
def test_a_tied_tensor_that_the_delta_has_by_its_other_name(method):
    """A file of a tied model holds one of its names, and that need not be the first in the module."""
    base = {"b": torch.randn(4, 3)}
    delta = dtrain.compress(base, {"b": base["b"] + 1}, method)
    module = module_of({"a": base["b"], "b": base["b"]})
    delta.apply_(module)
    assert module.a is module.b
    assert not torch.equal(module.a, base["b"])
    delta.remove_(module)
    assert raw(module.a) == raw(base["b"])


@methods
def test_a_tensor_that_was_reshaped_or_lost_since_is_refused(method):
    delta, module, _ = live(method)
    delta.apply_(module)
    matrix = module.matrix
    for other in (nn.Parameter(matrix.detach()[:2].clone()), None):
        module.matrix = other
        with pytest.raises(AppliedStateError, match="'matrix' changed since"):
            delta.remove_(module)
    module.matrix = matrix
    delta.remove_(module)


@methods
def test_ties_survive(method):
    delta, module, _ = live(method)
    delta.apply_(module)
    assert module.tied.a is module.tied.b
    assert same_bits({"w": module.tied.a}, {"w": delta.state_dict(zoo()[0])["tied.b"]})


def test_ties_that_training_broke_are_refused():
    shared = torch.randn(4, 3)
    base = {"a": shared, "b": shared}
    delta = dtrain.compress(base, {"a": shared + 1, "b": shared + 2}, Dare(keep=1))
    state = delta.state_dict(base)
    assert not torch.equal(state["a"], state["b"])
    module = module_of(base)
    with pytest.raises(BaseMismatchError, match=r"'a' and 'b' are one tied tensor.*two in the delta.*state_dict\(\)"):
        delta.apply_(module)
    assert torch.equal(module.a, shared)


def test_a_module_can_be_used_and_forgotten():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    tuned = copy.deepcopy(model)
    tuned(torch.randn(8, 4)).sum().backward()
    torch.optim.SGD(tuned.parameters(), lr=0.1).step()
    delta = dtrain.compress(model, tuned, Lossless())
    delta.apply_(model)
    inputs = torch.randn(5, 4)
    assert torch.equal(model.eval()(inputs), tuned.eval()(inputs))
    model(inputs).sum().backward()
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None  # the registry of applied deltas keeps no module alive


def test_frozen_and_inference_parameters():
    delta, module, before = live()
    module.requires_grad_(False)
    with torch.inference_mode():
        delta.apply_(module)
        delta.remove_(module)
    assert same_bits(snapshot(module), before)
