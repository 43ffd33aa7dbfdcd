"""Norms, biases, token embeddings and fresh heads: how they are stored, exactly, and what that costs."""

import math

import pytest
import torch
from torch import nn

import dtrain
from dtrain import ArtifactError, Dare, InputError, Lossless, Rules, SeededSign
from dtrain.artifact import Role, unpack_file
from dtrain.codes import dense, dense_bytes, fresh_values, vector_values
from dtrain.stages import Bits, Float16, Sign, Uniform, encode
from tests.artifact import craft, reference_decoder
from tests.methods.settings import bytes_of, raw, same_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
CODES = ["auto", "sign", "uniform4", "uniform8", "float16"]
FRESH = ["uniform8", "uniform4", "float16", "exact"]


def pair(dtype=torch.float32):
    """An encoder with a fresh head, moved a little."""
    torch.manual_seed(0)
    base = {
        "e.word_embeddings.weight": torch.randn(20, 8),
        "e.norm.weight": torch.ones(8),
        "e.norm.bias": torch.zeros(8),
        "e.dense.weight": torch.randn(8, 8),
        "e.norm.running_var": torch.rand(8) + 0.1,
    }
    base = {name: value.to(dtype) for name, value in base.items()}
    tuned = {name: value + 0.05 * torch.randn(value.shape).to(dtype) for name, value in base.items()}
    return base, tuned | {"classifier.weight": torch.randn(3, 8).to(dtype), "classifier.bias": torch.randn(3).to(dtype)}


def records_of(delta):
    return {record.name: record for record in delta.content.records}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fresh", FRESH)
@pytest.mark.parametrize("vectors", CODES)
def test_the_second_decoder_agrees(vectors, fresh, dtype):
    base, tuned = pair(dtype)
    delta = dtrain.compress(base, tuned, SeededSign(keep=0.5), rules=Rules(vectors=vectors, fresh=fresh))
    state, file = delta.state_dict(base), reference_decoder.parse(bytes(bytes_of(delta)))
    for name, record in file.records.items():
        assert reference_decoder.rebuild(record, raw(base[name]) if name in base else None) == raw(state[name]), name
    reference_decoder.fingerprint(file, {name: raw(value) for name, value in base.items()})
    read = dtrain.Delta(unpack_file(bytes_of(delta)))
    assert bytes_of(read) == bytes_of(delta)
    assert same_bits(read.state_dict(base), state)


@pytest.mark.parametrize(("vectors", "levels"), [("uniform4", 7), ("uniform8", 127)])
def test_vectors_are_off_by_half_a_step(vectors, levels):
    base, tuned = pair()
    state = dtrain.compress(base, tuned, SeededSign(), rules=Rules(vectors=vectors)).state_dict(base)
    for name in ("e.norm.weight", "e.norm.bias"):
        step = float((tuned[name] - base[name]).abs().max()) / levels
        assert float((state[name] - tuned[name]).abs().max()) <= 0.5001 * step + 1e-7


def test_the_sign_of_a_vector_keeps_its_mean_magnitude():
    base, tuned = pair()
    change = tuned["e.norm.bias"] - base["e.norm.bias"]
    found = dtrain.compress(base, tuned, SeededSign()).state_dict(base)["e.norm.bias"]
    assert torch.allclose(found, change.sign() * change.abs().mean())


def test_a_value_alone_is_exact_whatever_the_code():
    base, tuned = {"temperature.weight": torch.zeros(1), "w": torch.zeros(2, 2)}, torch.tensor([0.3])
    for code in CODES:
        delta = dtrain.compress(
            base, {"temperature.weight": tuned, "w": torch.ones(2, 2)}, Dare(), rules=Rules(vectors=code)
        )
        assert delta.state_dict(base)["temperature.weight"].item() == pytest.approx(0.3, rel=2**-11)


def test_whole_steps_of_sixteen_bits_survive():
    """Of a norm of ones in bfloat16 a few values move by whole rounding steps: the mean change is none."""
    base, tuned = pair(torch.bfloat16)
    tuned["e.norm.weight"] = base["e.norm.weight"].clone()
    tuned["e.norm.weight"][::4] += torch.tensor([2.0**-7, 2.0**-6], dtype=torch.bfloat16)
    for vectors, survives in (("auto", True), ("sign", False)):
        delta = dtrain.compress(base, tuned, SeededSign(), rules=Rules(vectors=vectors))
        assert torch.equal(delta.state_dict(base)["e.norm.weight"], tuned["e.norm.weight"]) == survives


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("fresh", "levels"), [("uniform8", 127), ("uniform4", 7)])
def test_rows_of_a_fresh_matrix_have_their_own_step(fresh, levels, dtype):
    base, tuned = pair(dtype)
    tuned["classifier.weight"] = (torch.randn(3, 8) * torch.tensor([[1.0], [1e-3], [0.0]])).to(dtype)
    delta = dtrain.compress(base, tuned, SeededSign(), rules=Rules(fresh=fresh))
    found, wanted = (state["classifier.weight"].double() for state in (delta.state_dict(base), tuned))
    step = wanted.abs().amax(1, keepdim=True) / levels
    rounding = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    assert bool(((found - wanted).abs() <= 0.501 * step + wanted.abs() * (rounding + 2**-11)).all())


@pytest.mark.parametrize("fresh", FRESH)
def test_what_is_no_fresh_matrix_stays_exact(fresh):
    base, tuned = pair()
    new = {"n.bias": torch.randn(5), "n.ids": torch.arange(9).view(3, 3), "n.weight": torch.randn(1, 1, 7)}
    new |= {"n.phase": torch.randn(2, 2, dtype=torch.complex64), "n.fp8": torch.randn(4, 4).to(torch.float8_e4m3fn)}
    state = dtrain.compress(base, tuned | new, SeededSign(), rules=Rules(fresh=fresh)).state_dict(base)
    assert all(
        raw(state[name]) == raw(value) for name, value in (new | {"classifier.bias": tuned["classifier.bias"]}).items()
    )


@pytest.mark.parametrize("fresh", ["uniform8", "uniform4"])
def test_a_fresh_matrix_of_nan_is_refused(fresh):
    base, tuned = pair()
    tuned["classifier.weight"][1, 2] = math.nan
    with pytest.raises(InputError, match=r"'classifier.weight' holds NaN or inf"):
        dtrain.compress(base, tuned, SeededSign(), rules=Rules(fresh=fresh))
    state = dtrain.compress(base, tuned, Lossless(), rules=Rules(fresh=fresh)).state_dict(base)
    assert same_bits(state, tuned)


def test_bitwise_methods_lose_nothing():
    base, tuned = pair()
    delta = dtrain.compress(base, tuned, Lossless())
    assert same_bits(delta.state_dict(base), tuned)
    assert not delta.report().dropped
    only = base | {"e.word_embeddings.weight": tuned["e.word_embeddings.weight"]}
    assert same_bits(dtrain.compress(base, only, Lossless()).state_dict(base), only)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embeddings, self.norm = nn.Embedding(20, 8), nn.LayerNorm(8)
        self.up, self.classifier = nn.Linear(8, 8), nn.Linear(8, 3)


def test_apply_fills_a_fresh_head_and_remove_gives_the_base_back():
    torch.manual_seed(1)
    base, tuned, live = Encoder(), Encoder(), Encoder()
    live.load_state_dict(base.state_dict())
    delta = dtrain.compress(base, tuned, SeededSign(keep=0.5))
    merged = delta.state_dict(base)
    delta.apply_(live)
    assert same_bits(live.state_dict(), merged)
    assert torch.equal(live.word_embeddings.weight, base.word_embeddings.weight)
    assert torch.allclose(live.classifier.weight, tuned.classifier.weight, atol=2e-3)
    delta.remove_(live)
    assert same_bits(live.state_dict(), base.state_dict())


# --- token embeddings


def test_embeddings_stay_at_the_base_until_asked_for():
    base, tuned = pair()
    delta = dtrain.compress(base, tuned, Dare(keep=1))
    record = records_of(delta)["e.word_embeddings.weight"]
    assert (record.role, record.payloads) == (Role.DROP, ())
    assert delta.report().dropped == ("e.word_embeddings.weight",)
    assert "left at the base" in str(delta.report())
    asked = dtrain.compress(base, tuned, Dare(keep=1), rules=Rules(embeddings=[]))
    assert asked.report().dropped == ()
    found = asked.state_dict(base)["e.word_embeddings.weight"]
    assert torch.allclose(found, tuned["e.word_embeddings.weight"], atol=1e-4)
    assert delta.content.metadata["rules"]["embeddings"] == "encoders"
    assert asked.content.metadata["rules"]["embeddings"] == []


def test_a_grown_vocabulary_is_stored_whole_and_never_left_out():
    base, tuned = pair()
    tuned["e.word_embeddings.weight"] = torch.cat([tuned["e.word_embeddings.weight"], torch.randn(2, 8)])
    delta = dtrain.compress(base, tuned, Dare(keep=1))
    assert delta.report().dropped == ()
    found = delta.state_dict(base)["e.word_embeddings.weight"]
    assert torch.allclose(found, tuned["e.word_embeddings.weight"], atol=2e-2)


def test_new_embeddings_are_stored_whole():
    base, tuned = pair()
    del base["e.word_embeddings.weight"]
    assert "e.word_embeddings.weight" in dtrain.compress(base, tuned, Dare()).report().whole


def test_unchanged_embeddings_are_unchanged():
    base, tuned = pair()
    tuned["e.word_embeddings.weight"] = base["e.word_embeddings.weight"].clone()
    assert records_of(dtrain.compress(base, tuned, Dare()))["e.word_embeddings.weight"].role is Role.SAME


def test_a_delta_of_embeddings_alone_is_refused_in_a_sentence():
    base, tuned = pair()
    only = base | {"e.word_embeddings.weight": tuned["e.word_embeddings.weight"]}
    with pytest.raises(InputError, match=r"stays at the base by `drop` or `embeddings`: nothing is left"):
        dtrain.compress(base, only, Dare())
    assert dtrain.compress(base, only, Dare(keep=1), rules=Rules(embeddings=())).report().ratio > 0


def test_nothing_is_close_to_a_base_of_zeros():
    _, tuned = pair()
    state = dtrain.compress(None, tuned, Dare(keep=1)).state_dict(None)
    assert all(
        torch.allclose(state[name], value, rtol=2**-10, atol=1e-6) for name, value in tuned.items() if "e." in name
    )
    asked = dtrain.compress(None, tuned, Dare(keep=1), rules=Rules(vectors="sign")).state_dict(None)
    assert float(asked["e.norm.bias"].abs().std()) < 1e-6


class Tied(nn.Module):
    """The first name of the tied tensor is the output layer's."""

    def __init__(self):
        super().__init__()
        self.decoder, self.word_embeddings = nn.Linear(8, 20, bias=False), nn.Embedding(20, 8)
        self.up = nn.Linear(8, 8)
        self.decoder.weight = self.word_embeddings.weight


def test_a_module_and_a_file_with_one_of_the_names_get_the_same_rule():
    torch.manual_seed(2)
    base, tuned = Tied(), Tied()
    files = [
        {name: value for name, value in model.state_dict().items() if "decoder" not in name} for model in (base, tuned)
    ]
    for first, second in ((base, tuned), (files[0], files[1]), (files[0], tuned), (base, files[1])):
        delta = dtrain.compress(first, second, SeededSign())
        assert len(delta.report().dropped) == 1
        delta.verify(base)


# --- sizes


@pytest.mark.parametrize("shape", [(), (1,), (0,), (9,), (3, 7), (4, 3, 2, 2), (0, 5)], ids=str)
@pytest.mark.parametrize("quantise", [Sign(), Uniform(4), Uniform(8, 7), Float16(), Bits(4)], ids=repr)
def test_sizes_are_known_before(quantise, shape):
    values = torch.randn(shape)
    if isinstance(quantise, Uniform) and quantise.group and (len(shape) < 2 or math.prod(shape[1:]) != 7):
        quantise = Uniform(8, math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape))
    given = values.reshape(-1).view(torch.uint8) if isinstance(quantise, Bits) else values
    assert dense_bytes(quantise, shape) == encode(dense(quantise), "w", given).data.numel()


def test_codes_by_dtype_and_shape():
    assert vector_values("auto", torch.float32) == vector_values("auto", torch.float64) == Sign()
    assert vector_values("auto", torch.bfloat16) == vector_values("auto", torch.float16) == Uniform(4)
    assert fresh_values("uniform8", (4, 3, 2), torch.float32) == Uniform(8, 6)
    assert fresh_values("uniform8", (1, 6), torch.float32) == Bits(4)
    assert fresh_values("float16", (4, 3), torch.bfloat16) == Float16()


# --- crafted files


def whole(stages, payload, shape=(2, 2), dtype=0, scale=1.0):
    record = craft.record(data=[payload], digest=b"", scale=scale)
    table = craft.manifest([stages], [craft.kind(role=2, dtype=dtype, shape=shape)], [record])
    return craft.build(table, payload)


def test_a_whole_tensor_is_read_as_the_page_says():
    raw_file = whole(craft.pipeline(quantise=craft.sign()), b"\x06", scale=0.5)
    (record,) = unpack_file(raw_file).records
    assert dtrain.runtime.merged(record, None).tolist() == [[-0.5, 0.5], [0.5, -0.5]]
    (found,) = reference_decoder.parse(bytes(raw_file)).records.values()
    assert reference_decoder.rebuild(found, None) == raw(torch.tensor([-0.5, 0.5, 0.5, -0.5]))


BAD = {
    "positions": whole(craft.pipeline(select=craft.INDEXED), b"\0"),
    "a mask": whole(craft.pipeline(select=craft.bernoulli(0.5)), b""),
    "zstd": whole(craft.pipeline(quantise=craft.sign(), code=craft.ZSTD), b"\0"),
    "rans": whole(craft.pipeline(quantise=craft.uniform(2), code=craft.RANS), b"\0"),
    "transposed": whole(craft.pipeline(transform=b"\3", quantise=craft.sign()), b"\0"),
    "factors": whole(craft.pipeline(transform=craft.low_rank(1)), bytes(8)),
    "integers": whole(craft.pipeline(quantise=craft.sign()), b"\0", dtype=8),
    "float8": whole(craft.pipeline(quantise=craft.sign()), b"\0", dtype=15),
}


@pytest.mark.parametrize("raw_file", BAD.values(), ids=BAD.keys())
def test_what_a_whole_tensor_cannot_be_is_refused(raw_file):
    with pytest.raises(ArtifactError, match="manifest: "):
        unpack_file(raw_file)
    with pytest.raises(AssertionError):
        reference_decoder.parse(bytes(raw_file))


def test_a_whole_tensor_of_the_wrong_size_is_refused_before_it_is_made():
    with pytest.raises(ArtifactError, match=r"tensor 'w': .*1 bytes where"):
        unpack_file(whole(craft.pipeline(quantise=craft.sign()), b"\0", shape=(1 << 23, 1 << 24)))
