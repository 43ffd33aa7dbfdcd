"""On a live module: all of it or nothing, and off again bit for bit."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import dtrain
from dtrain import AppliedStateError, BaseMismatchError, Dare, Lossless
from dtrain.runtime import inplace
from tests.methods.settings import compress_zoo, module_of, raw, same_bits, zoo

methods = pytest.mark.parametrize("method", [Dare(keep=0.3), Dare(keep=1), Lossless()], ids=repr)


def live(method=None):
    """Return (delta, module at the base with some head, a copy of what the module holds)."""
    base, tuned, delta = compress_zoo(method or Dare(keep=0.3))
    module = module_of(base | {name: torch.randn(value.shape) for name, value in tuned.items() if "head" in name})
    return delta, module, snapshot(module)


def snapshot(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


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


@methods
@pytest.mark.parametrize("number", [1, 2, 5, 9])
@pytest.mark.parametrize("after", [False, True], ids=["before the write", "after the write"])
def test_a_failing_write_restores_everything(monkeypatch, method, number, after):
    delta, module, before = live(method)
    write, calls = inplace.write, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) != number or after:
            write(*arguments)
        if len(calls) == number:
            raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(inplace, "write", failing)
        with pytest.raises(Broken):
            delta.apply_(module)
    assert same_bits(snapshot(module), before)
    delta.apply_(module)
    delta.remove_(module)
    assert same_bits(snapshot(module), before)


@pytest.mark.parametrize("step", ["_read", "_touched", "Undo"])
def test_a_failure_at_any_other_step_restores_everything(monkeypatch, step):
    """The digests of what was written take long on a large model: an interrupt there must not lose the base."""
    delta, module, before = live()
    original, calls = getattr(inplace, step), []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(inplace, step, failing)
        with pytest.raises(KeyboardInterrupt):
            delta.apply_(module)
    assert same_bits(snapshot(module), before)


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
