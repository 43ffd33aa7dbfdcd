"""What every method promises, over one table of settings."""

import functools
import json
import math
import re
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtrain
from dtrain import METHODS, Dare, InputError, NeedsDataError
from tests.artifact import reference_decoder as reference
from tests.methods.settings import (
    LOSSY,
    RULES,
    SETTINGS,
    bytes_of,
    calibration_of,
    compress_zoo,
    module_of,
    raw,
    rebuilt,
    same_bits,
    zoo,
)

SEARCHED = ("DeltaDQ search", "EoRA on a search")  # which cannot encode before the search
FREE = [setting for setting in SETTINGS if setting.method.needs == "nothing"]
ENCODERS = [setting for setting in LOSSY if setting.id not in SEARCHED]
ONE_EACH = list({type(setting.method): setting for setting in reversed(ENCODERS)}.values())


once = functools.cache(compress_zoo)  # what no test writes to


def over(table):
    return pytest.mark.parametrize("setting", table, ids=lambda setting: setting.id)


def test_the_table_has_every_method():
    assert {type(setting.method) for setting in SETTINGS} == set(METHODS)
    assert len({setting.id for setting in SETTINGS}) == len(SETTINGS)


@over(SETTINGS)
def test_file_equals_memory(setting, tmp_path):
    base, _, delta = once(setting.method)
    assert delta.save(tmp_path / "delta") == (tmp_path / "delta").stat().st_size == delta.file_bytes()
    loaded = dtrain.load(tmp_path / "delta")
    loaded.verify(base)
    assert loaded.content.metadata == delta.content.metadata
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))
    assert bytes_of(loaded) == bytes_of(delta)


@over(SETTINGS)
def test_same_bytes_in_any_order_on_any_number_of_threads(setting):
    base, tuned, delta = once(setting.method)
    torch.set_num_threads(2)
    other = {name: tuned[name].clone() if "tied" not in name else tuned[name] for name in reversed(tuned)}
    turned = dict(reversed(base.items()))
    again = dtrain.compress(turned, other, setting.method, calibration=calibration_of(other), rules=RULES)
    assert bytes_of(again) == bytes_of(delta)


@over(ONE_EACH)
def test_threads_do_not_matter_on_a_matrix_worth_sharing(setting):
    found, delta = [], torch.randn(240, 180)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        payloads = setting.method.plan([("w", lambda: delta)])("w", delta, None)
        found.append([(payload.pipeline, payload.scale, raw(payload.data)) for payload in payloads])
    assert found[0] == found[1]


@over(SETTINGS)
def test_a_second_reader_finds_the_same_weights(setting):
    base, tuned, delta = once(setting.method)
    file = reference.parse(bytes_of(delta))
    state = delta.state_dict(base)
    bare = {name: raw(value) for name, value in base.items()}
    assert file.provenance["method"] == delta.content.metadata["method"]
    assert set(file.records) == (set(tuned) | {"pooler"}) - {"tied.b"}
    assert file.fingerprint == reference.fingerprint(file, bare)
    for name, record in file.records.items():
        found = raw(state[name]) if name in state else None
        assert reference.agrees(record, bare.get(name), found), name
    assert setting.exact == all(map(reference.exact, file.records.values()))


@over(SETTINGS)
def test_what_is_not_the_methods_is_exact(setting):
    base, tuned, delta = once(setting.method)
    state = delta.state_dict(base)
    assert state.keys() == tuned.keys()
    assert all((state[k].dtype, state[k].shape) == (tuned[k].dtype, tuned[k].shape) for k in tuned)
    exact = [k for k in tuned if not tuned[k].is_floating_point()] + ["frozen", "empty", "head.bias"]
    assert all(raw(state[name]) == raw(tuned[name]) for name in exact)
    step = tuned["head.weight"].abs().amax(1, keepdim=True) / 127
    assert bool(((state["head.weight"] - tuned["head.weight"]).abs() <= 0.501 * step).all())
    assert raw(state["dropped"]) == raw(base["dropped"])
    assert state["tied.a"] is state["tied.b"]
    assert not {v.data_ptr() for v in state.values() if v.numel()} & {v.data_ptr() for v in base.values()}


@over(SETTINGS)
def test_apply_equals_state_dict_and_remove_restores(setting):
    base, tuned, delta = once(setting.method)
    heads = {name: torch.randn(value.shape) for name, value in tuned.items() if name.startswith("head")}
    module = module_of(base | heads)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    delta.apply_(module)
    after = module.state_dict()
    assert same_bits({name: after[name] for name in tuned}, delta.state_dict(base))
    assert raw(after["pooler"]) == raw(base["pooler"])
    delta.remove_(module)
    assert same_bits(module.state_dict(), before)
    assert module.tied.a is module.tied.b


@over([setting for setting in SETTINGS if setting.full])
def test_at_its_finest_a_method_recovers_the_delta(setting):
    base, tuned, delta = compress_zoo(setting.full)
    state = delta.state_dict(base)
    own = [name for name, value in tuned.items() if RULES.role(name, value.shape, value.dtype) == "method"]
    greatest = max(float((tuned[name].double() - base[name].double()).abs().max()) for name in own)
    for name in own:
        # one rounding to the tensor's dtype, one of the sum in float32
        ulp = max(torch.finfo(tuned[name].dtype).eps, 0.0 if tuned[name].dtype == torch.float64 else 2**-23)
        bound = setting.error * greatest * 1.01 + ulp * tuned[name].double().abs()
        assert bool(((state[name].double() - tuned[name].double()).abs() <= bound).all()), name


@over([setting for setting in SETTINGS if setting.unbiased])
def test_mean_over_seeds_is_the_delta(setting):
    """Every element within five standard errors of the mean of 200 masks, beside the format's own error."""
    rounds, delta = 200, torch.randn(8, 12)
    found = torch.stack([rebuilt(replace(setting.method, seed=seed), delta) for seed in range(rounds)])
    slack = 5 * found.std(0) / math.sqrt(rounds) + setting.error * float(delta.abs().max())
    assert bool(((found.mean(0) - delta).abs() < slack).all())


@over(ENCODERS)
def test_any_shape_can_be_encoded(setting):
    for shape in [(), (0,), (5,), (0, 3), (3, 0), (1, 1), (1, 40), (40, 1), (2, 0, 3), (3, 2, 5)]:
        found = rebuilt(setting.method, torch.randn(shape))
        assert found.shape == shape
        assert bool(found.isfinite().all()), shape
        assert not bool(rebuilt(setting.method, torch.zeros(shape)).any()), shape


@over(ENCODERS)
@pytest.mark.parametrize("size", [2.0**-60, 2.0**40])
def test_the_unit_of_the_delta_does_not_matter(setting, size):
    delta = torch.randn(40, 30)
    expected, found = rebuilt(setting.method, delta), rebuilt(setting.method, delta * size) / size
    assert float((found - expected).norm()) <= 1e-3 * float(expected.norm())


BAD = [("matrix", math.nan), ("bf16", math.inf), ("vector", -math.inf), ("head.weight", math.nan)]


@over(ONE_EACH)
@pytest.mark.parametrize(("where", "bad"), BAD)
def test_lossy_methods_refuse_nan_and_inf(setting, where, bad):
    base, tuned = zoo()
    calibration = calibration_of(tuned)
    tuned[where].view(-1)[0] = bad
    with pytest.raises(InputError, match=f"{where}.*NaN or inf.*Lossless"):
        dtrain.compress(base, tuned, setting.method, calibration=calibration, rules=RULES)


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(FREE),
)
def test_any_models_agree_with_the_reference(shapes, dtype, setting):
    base = {f"{i}.w": torch.randn(shape).to(dtype) for i, shape in enumerate([*shapes, [1]])}
    tuned = {name: value + torch.randn(value.shape).to(dtype) for name, value in base.items()}
    delta = dtrain.compress(base, tuned, setting.method)
    state, file = delta.state_dict(base), reference.parse(bytes_of(delta))
    for name, record in file.records.items():
        assert reference.agrees(record, raw(base[name]), raw(state[name]))
    assert not setting.method.bitwise or same_bits(state, tuned)


def test_float64_deltas_are_not_lost_in_float32():
    """The delta of a float64 model may be far below float32's resolution of the weights."""
    base = {"w": 1 + torch.rand(8, 8, dtype=torch.float64)}
    tuned = {"w": base["w"] + 1e-9 * torch.randn(8, 8, dtype=torch.float64)}
    state = dtrain.compress(base, tuned, Dare(keep=1)).state_dict(base)
    delta = tuned["w"] - base["w"]
    assert float((state["w"] - base["w"] - delta).norm() / delta.norm()) < 2**-10


def from_description(described):
    kind = {method.__name__: method for method in METHODS}[described["name"]]
    arguments = {name: value for name, value in described.items() if name != "name"}
    return kind(**{k: from_description(v) if isinstance(v, dict) else v for k, v in arguments.items()})


@over(SETTINGS)
def test_methods_are_frozen_and_describe_themselves(setting):
    method = setting.method
    assert is_dataclass(method)
    described = json.loads(json.dumps(method.describe(), allow_nan=False))
    assert described == method.describe()
    assert from_description(described) == method == replace(method)
    assert hash(from_description(described)) == hash(method)
    for field in fields(method):
        assert f"{field.name}={getattr(method, field.name)!r}" in repr(method)
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, 1)


@over(SETTINGS)
def test_nominal_bits_are_a_number_or_not_claimed(setting):
    assert math.isnan(setting.method.nominal_bits) == setting.method.bitwise
    assert setting.method.bitwise or 0 <= setting.method.nominal_bits < 64


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_card(method):
    """The docstring is the method card: `dtrain methods` and `--help` show it."""
    card = method.__doc__
    assert re.fullmatch(r"[A-Z].*\.", card.splitlines()[0])
    headings = ["Source", "Data needed", "Bits per parameter", "When it fails"]
    assert re.findall(r"^    \* \*\*(.+?)\*\*: ", card, re.MULTILINE) == headings
    arguments = card.partition("    Args:\n")[2].partition("    Raises:")[0]
    assert re.findall(r"^        (\w+): ", arguments, re.MULTILINE) == [field.name for field in fields(method)]
    assert all(number in card for number in re.findall(r"\d{4}\.\d{5}", method.paper))


@over([setting for setting in SETTINGS if setting.method.needs != "nothing"])
def test_a_missing_calibration_is_a_sentence(setting):
    base, tuned = zoo()
    message = f"{type(setting.method).__name__} looks at the {setting.method.needs} of every layer but got no calibr"
    with pytest.raises(NeedsDataError, match=message):
        dtrain.compress(base, tuned, setting.method, rules=RULES)
