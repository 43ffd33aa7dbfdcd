"""What every method promises, over one table of settings."""

import math
from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dtrain
from dtrain import METHODS, Dare, DareX, InputError, Lossless, NeedsDataError
from dtrain.stages import decode
from tests.artifact import reference_decoder as reference
from tests.methods.settings import HALF, LOSSY, RULES, SETTINGS, bytes_of, compress_zoo, module_of, raw, same_bits, zoo

every = pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.id)
lossy = pytest.mark.parametrize("setting", LOSSY, ids=lambda setting: setting.id)


def rebuilt(method, delta, name="w"):
    """Return scale * decode(encode(delta)) as a dense float64 tensor."""
    total = torch.zeros(delta.numel(), dtype=torch.float64)
    for payload in method.encode(name, delta):
        positions, values = decode(payload, name, delta.shape)
        total[slice(None) if positions is None else positions] += values.double() * payload.scale
    return total.view(delta.shape)


def test_the_table_has_every_method():
    assert {type(setting.method) for setting in SETTINGS} == set(METHODS)


@every
def test_file_equals_memory(setting, tmp_path):
    base, _, delta = compress_zoo(setting.method)
    assert delta.save(tmp_path / "delta") == (tmp_path / "delta").stat().st_size == delta.file_bytes()
    loaded = dtrain.load(tmp_path / "delta")
    loaded.verify(base)
    assert loaded.content.metadata == delta.content.metadata
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))
    assert bytes_of(loaded) == bytes_of(delta)


@every
def test_same_bytes_twice(setting):
    base, tuned, delta = compress_zoo(setting.method)
    torch.set_num_threads(1)
    other = {name: tuned[name].clone() if "tied" not in name else tuned[name] for name in reversed(tuned)}
    again = dtrain.compress(dict(reversed(base.items())), other, setting.method, rules=RULES)
    assert bytes_of(again) == bytes_of(delta)


@every
def test_file_equals_the_reference_decoders_reconstruction(setting):
    base, tuned, delta = compress_zoo(setting.method)
    file = reference.parse(bytes_of(delta))
    state = delta.state_dict(base)
    bare = {name: raw(value) for name, value in base.items()}
    assert file.provenance["method"] == delta.content.metadata["method"]
    assert set(file.records) == (set(tuned) | {"pooler"}) - {"tied.b"}
    assert file.fingerprint == reference.fingerprint(file, bare)
    for name, record in file.records.items():
        found = reference.rebuild(record, bare.get(name))
        assert found == (raw(state[name]) if name in state else None), name


@every
def test_what_is_not_the_methods_is_exact(setting):
    base, tuned, delta = compress_zoo(setting.method)
    state = delta.state_dict(base)
    assert state.keys() == tuned.keys()
    assert all((state[k].dtype, state[k].shape) == (tuned[k].dtype, tuned[k].shape) for k in tuned)
    exact = [k for k in tuned if k.startswith("head") or not tuned[k].is_floating_point()] + ["frozen", "empty"]
    assert all(raw(state[name]) == raw(tuned[name]) for name in exact)
    assert raw(state["dropped"]) == raw(base["dropped"])
    assert state["tied.a"] is state["tied.b"]
    assert not {v.data_ptr() for v in state.values() if v.numel()} & {v.data_ptr() for v in base.values()}


@every
def test_apply_equals_state_dict_and_remove_restores(setting):
    base, tuned, delta = compress_zoo(setting.method)
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


@pytest.mark.parametrize("setting", [s for s in LOSSY if s.error], ids=lambda setting: setting.id)
def test_keep_one_recovers_the_delta(setting):
    base, tuned = zoo()
    method = replace(setting.method, keep=1, **({"q": 1.0} if isinstance(setting.method, DareX) else {}))
    state = dtrain.compress(base, tuned, method, rules=RULES).state_dict(base)
    for name, value in tuned.items():
        if value.is_floating_point() and value.numel() and name != "dropped" and not name.startswith("head"):
            delta = value.double() - base[name].double()
            # one rounding of the value's format, one to the tensor's dtype, one of the sum in float32
            ulp = max(torch.finfo(value.dtype).eps, 0.0 if value.dtype == torch.float64 else 2**-23)
            bound = setting.error * delta.abs() * 1.01 + ulp * value.double().abs() + setting.error * 2**-28
            assert bool(((state[name].double() - value.double()).abs() <= bound).all()), name


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.unbiased], ids=lambda setting: setting.id)
def test_mean_over_seeds_is_the_delta(setting):
    """Every element within five standard deviations of the mean of 200 masks, beside the format's own error."""
    keep, rounds, delta = setting.method.keep, 200, torch.randn(8, 12)
    mean = sum(rebuilt(replace(setting.method, seed=seed), delta) for seed in range(rounds)) / rounds
    slack = 5 * math.sqrt((1 - keep) / keep / rounds) + setting.error
    assert float(((mean - delta) / delta).abs().max()) < slack


@pytest.mark.parametrize("values", ["float16", "bfloat16", "uniform8", "uniform4", "uniform2", "sign"])
@pytest.mark.parametrize("mask", ["bernoulli", "stratified"])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_norm_matching_keeps_the_norm(values, mask, size):
    delta = size * torch.randn(100, 50)
    found = rebuilt(DareX(keep=0.05, q="norm", values=values, mask=mask), delta)
    assert float(found.norm() / delta.double().norm()) == pytest.approx(1, rel=1e-3)


def test_norm_matching_where_nothing_is_kept():
    delta = torch.randn(1, 3)
    assert float(rebuilt(DareX(keep=1e-6, q="norm"), delta).abs().sum()) == 0
    assert float(rebuilt(DareX(keep=0.5, q="norm"), torch.zeros(40, 40)).abs().sum()) == 0


def test_q_is_a_division():
    delta = torch.randn(40, 30)
    (dare,), (fixed,) = Dare(keep=0.25).encode("w", delta), DareX(keep=0.25, q=0.25).encode("w", delta)
    assert (torch.equal(dare.data, fixed.data), dare.scale) == (True, fixed.scale)
    kept = rebuilt(DareX(keep=0.25, q=1.0), delta)
    assert torch.allclose(rebuilt(DareX(keep=0.25, q=0.4), delta), kept / 0.4, rtol=1e-6)
    assert 0.2 < float((kept != 0).double().mean()) < 0.3
    assert torch.allclose(kept[kept != 0], delta.double()[kept != 0], rtol=HALF)


@lossy
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["matrix", "vector", "bf16", "head.weight"])
def test_lossy_methods_refuse_nan_and_inf(setting, bad, where):
    base, tuned = zoo()
    tuned[where].view(-1)[0] = bad
    with pytest.raises(InputError, match=f"{where}.*NaN or inf.*Lossless"):
        dtrain.compress(base, tuned, setting.method, rules=RULES)


PATTERNS = {  # quiet, signalling and negative NaN with a payload, infinities, -0.0, the least subnormal
    torch.float32: [0x7FC12345, 0x7F800001, 0xFFC00001, 0x7F800000, 0xFF800000, 0x80000000, 1],
    torch.bfloat16: [0x7FC1, 0x7F81, 0xFFC1, 0x7F80, 0xFF80, 0x8000, 1],
    torch.float16: [0x7E01, 0x7C01, 0xFE01, 0x7C00, 0xFC00, 0x8000, 1],
}


@pytest.mark.parametrize("dtype", PATTERNS, ids=str)
@pytest.mark.parametrize("name", ["w", "head.weight"])
def test_lossless_keeps_every_bit(dtype, name, tmp_path):
    width = torch.tensor([], dtype=dtype).itemsize
    bits = b"".join(pattern.to_bytes(width, "little") for pattern in PATTERNS[dtype])
    special = torch.frombuffer(bytearray(bits), dtype=dtype).view(7, 1)
    base = {"v": torch.ones(2), "w": torch.zeros(7, 1, dtype=dtype)}
    tuned = {"v": torch.zeros(2), "w": base["w"], name: special}
    for old, new in ((base, tuned), (tuned, {k: base.get(k, tuned[k]) for k in tuned})):
        dtrain.compress(old, new, Lossless()).save(tmp_path / "delta")
        assert same_bits(dtrain.load(tmp_path / "delta").state_dict(old), new)


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.integers(0, 5), max_size=4), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from(SETTINGS),
)
def test_any_shapes_agree_with_the_reference(shapes, dtype, setting):
    base = {f"{i}.w": torch.randn(shape).to(dtype) for i, shape in enumerate([*shapes, [1]])}
    tuned = {name: value + 0.01 * torch.randn(value.shape).to(dtype) for name, value in base.items()}
    delta = dtrain.compress(base, tuned, setting.method)
    state, file = delta.state_dict(base), reference.parse(bytes_of(delta))
    for name, record in file.records.items():
        assert reference.rebuild(record, raw(base[name])) == raw(state[name])
    assert not setting.method.bitwise or same_bits(state, tuned)


def test_float64_deltas_are_not_lost_in_float32():
    """The delta of a float64 model may be far below float32's resolution of the weights."""
    base = {"w": 1 + torch.rand(8, 8, dtype=torch.float64)}
    tuned = {"w": base["w"] + 1e-9 * torch.randn(8, 8, dtype=torch.float64)}
    state = dtrain.compress(base, tuned, Dare(keep=1)).state_dict(base)
    delta = tuned["w"] - base["w"]
    assert float((state["w"] - base["w"] - delta).norm() / delta.norm()) < 2**-10


@pytest.mark.parametrize("method", [Dare(keep=2.0**-16), DareX(keep=0.5, q=2.0**-16)])
def test_scales_beyond_float32_are_refused_with_a_sentence(method):
    base = {"w": torch.zeros(512, 512)}
    with pytest.raises(InputError, match="'w'"):
        dtrain.compress(base, {"w": torch.full((512, 512), 3e38)}, method)


@every
def test_methods_are_frozen_and_describe_themselves(setting):
    method = setting.method
    assert is_dataclass(method)
    assert type(method).source in type(method).__doc__ or "reading" in type(method).source
    assert method == replace(method)
    described = method.describe()
    assert type(method)(**{k: v for k, v in described.items() if k != "name"}) == method
    for field in fields(method):
        with pytest.raises(FrozenInstanceError):
            setattr(method, field.name, 1)


@pytest.mark.parametrize("method", [Dare, DareX])
@pytest.mark.parametrize(
    "arguments",
    [{"keep": 0}, {"keep": 1.1}, {"keep": math.nan}, {"seed": -1}, {"mask": "none"}, {"values": "int8"}],
    ids=str,
)
def test_bad_arguments_are_refused_at_construction(method, arguments):
    with pytest.raises(InputError, match=f"`{next(iter(arguments))}` must be"):
        method(**arguments)


@pytest.mark.parametrize(
    "arguments", [{"q": 0}, {"q": 1.01}, {"q": "best"}, {"scope": "row"}, {"search": "sgd"}, {"masks": 0}], ids=str
)
def test_bad_darex_arguments_are_refused(arguments):
    with pytest.raises(InputError, match=f"`{next(iter(arguments))}`.* must be|must be.*`{next(iter(arguments))}`"):
        DareX(**arguments)


def test_a_search_needs_an_objective():
    base, tuned = zoo()
    with pytest.raises(NeedsDataError, match="q='norm'"):
        dtrain.compress(base, tuned, DareX(keep=0.1))
