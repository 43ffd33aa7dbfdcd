"""A family's shared base vector: what it is, how a task's file refers to it, and what is refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import dtrain
from dtrain import (
    ArtifactError,
    BaseMismatchError,
    BitDelta,
    Dare,
    DareX,
    Dbms,
    Delta,
    InputError,
    NeedsDataError,
    Rules,
)
from dtrain.artifact import DIGEST_BYTES, Content, Role, file_digest, unpack_file
from dtrain.methods.dbms import as_base_vector
from dtrain.stages import HALF, SHARED, Payload, Pipeline, Shared, Transposed, decode, encode, kept_values
from tests.artifact import craft, reference_decoder
from tests.methods.settings import RULES, _change, bytes_of, module_of, raw, same_bits, tiny, zoo

EMPTY = torch.empty(0, dtype=torch.uint8)
METHOD = Dare(keep=0.3, seed=7)
MATRICES = {"bf16", "fp16", "fp64", "größe/x", "matrix", "sliced", "tied.a", "transposed"}


def family(number=3):
    """Return the zoo's base and several fine-tunes of it, each with a head of its own."""
    base, tuned = zoo()
    others = []
    for classes in range(2, number + 1):
        other = {name: _change(value) if value.is_floating_point() else value for name, value in tuned.items()}
        other |= {"tied.b": other["tied.a"], "frozen": base["frozen"], "head.weight": torch.randn(classes, 16)}
        others.append(other)
    return base, [tuned, *others]


def refer(delta, shared, lam=0.7, only=None):
    """Return a task's delta with a reference before the payloads of every tensor that the shared file changes."""
    names = {record.name for record in shared.content.records if record.payloads} & {*(only or MATRICES)}
    records = tuple(
        replace(r, payloads=(Payload(SHARED, EMPTY, lam), *r.payloads)) if r.name in names else r
        for r in delta.content.records
    )
    content = replace(delta.content, records=records, shared=file_digest(shared.content))
    return Delta(content, delta.origin, shared.content)


def task(lam=0.7):
    """Return the base, the shared delta of a family, and the delta of a task that refers to it."""
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, Dare(keep=0.4), merge="elect", rules=RULES)
    return base, shared, refer(dtrain.compress(base, tuned[0], METHOD, rules=RULES), shared, lam)


def record_of(delta, name):
    return next(record for record in delta.content.records if record.name == name)


def with_record(content, name, shared=None, **changes):
    records = tuple(replace(r, **changes) if r.name == name else r for r in content.records)
    return replace(content, records=records, shared=content.shared if shared is None else shared)


@dataclass(frozen=True)
class Spy(Dare):
    """Remembers what it was given to encode."""

    seen: ClassVar[dict[str, torch.Tensor]] = {}

    def encode(self, name, delta, inputs=None):
        self.seen[name] = delta.clone()
        return super().encode(name, delta, inputs)


def vectors(base, tuned, merge, rules=RULES):
    Spy.seen.clear()
    dtrain.shared_base(base, tuned, Spy(keep=0.5), merge=merge, rules=rules)
    return dict(Spy.seen)


def deltas(base, tuned, name):
    wide = torch.promote_types(base[name].dtype, torch.float32)
    return [(state[name].to(wide) - base[name].to(wide)).float().flatten().tolist() for state in tuned]


def test_the_mean_is_the_mean():
    base, tuned = family(4)
    found = vectors(base, tuned, "mean")
    assert found.keys() >= MATRICES
    for name, vector in found.items():
        expected = [sum(values) / 4 for values in zip(*deltas(base, tuned, name), strict=True)]
        assert torch.equal(vector.flatten(), torch.tensor(expected, dtype=torch.float64).float())


def test_the_election_is_that_of_emr_merging():
    """By loops: the sign of the sum, and the greatest magnitude among those that have it."""
    base, tuned = family(4)
    for name, vector in vectors(base, tuned, "elect").items():
        for found, values in zip(vector.flatten().tolist(), zip(*deltas(base, tuned, name), strict=True), strict=True):
            total = sum(values)
            agreeing = [value for value in values if value * total > 0]
            assert found == (max(agreeing, key=abs) if agreeing else 0.0)


def test_votes_that_cancel_elect_nothing():
    base = {"w": torch.zeros(2, 2), "n": torch.zeros(2)}
    up, down = torch.tensor([[1.0, 2.0], [3.0, -1.0]]), torch.tensor([[-1.0, 1.0], [-2.0, -2.0]])
    found = vectors(base, [{"w": up, "n": torch.ones(2)}, {"w": down, "n": torch.ones(2)}], "elect", Rules())["w"]
    assert found.tolist() == [[0.0, 2.0], [3.0, -2.0]]


@pytest.mark.parametrize("merge", ["mean", "elect"])
def test_a_family_of_one_model_is_its_delta(merge):
    base, (tuned, _) = family(2)
    shared = dtrain.shared_base(base, [tuned, tuned], METHOD, merge=merge, rules=RULES)
    alone = dtrain.compress(base, tuned, as_base_vector(METHOD), rules=RULES)
    found = {record.name: record.payloads for record in shared.content.records if record.payloads}
    assert found.keys() >= MATRICES
    for name, payloads in found.items():
        assert [(p.scale, p.data.tolist()) for p in payloads] == [
            (p.scale, p.data.tolist()) for p in record_of(alone, name).payloads
        ]


def test_only_what_all_change_is_shared():
    base, tuned = family()
    tuned[1]["matrix"] = base["matrix"].clone()
    tuned[2]["bf16"] = torch.randn(4, 4)  # of another shape: whole there
    del tuned[0]["fp16"]
    rules = replace(RULES, exclude=["sliced"])
    shared = dtrain.shared_base(base, tuned, METHOD, rules=rules)
    changed = {record.name for record in shared.content.records if record.role is Role.ADD}
    assert changed & MATRICES == MATRICES - {"matrix", "bf16", "fp16", "sliced"}
    assert not changed & {"frozen", "dropped", "vector", "steps", "scalar", "head.weight"}


def test_the_shared_file_turns_the_base_into_base_plus_b(tmp_path):
    base, tuned = family()
    made = dtrain.shared_base(base, tuned, Dare(keep=0.4), rules=RULES)
    made.save(tmp_path / "shared")
    shared = dtrain.load(tmp_path / "shared")
    shared.verify(base)
    state = shared.state_dict(base)
    assert state.keys() == base.keys()
    for name, value in base.items():
        record = record_of(shared, "tied.a" if name == "tied.b" else name)
        assert state[name].dtype == value.dtype
        if not record.payloads:
            assert raw(state[name]) == raw(value)
            continue
        wide = torch.promote_types(value.dtype, torch.float32)
        (payload,) = record.payloads
        change = decode(payload, record.name, record.shape).dense(value.numel()).to(wide) * payload.scale
        assert torch.equal(state[name].flatten(), (value.to(wide).flatten() + change).to(value.dtype))
    module = module_of(base)
    shared.apply_(module)
    assert module.tied.a is module.tied.b
    assert same_bits(dict(module.state_dict()), state)
    shared.remove_(module)
    assert same_bits(dict(module.state_dict()), base)
    with pytest.raises(BaseMismatchError, match="other values"):
        shared.verify({**base, "frozen": base["frozen"] + 1})


def test_a_fresh_head_of_the_base_is_left_out():
    """Its values differ from one instance to the next, but the vector suits the base without it as well."""
    base, tuned = family()
    headed = {**base, "head.weight": torch.randn(3, 16)}
    shared = dtrain.shared_base(headed, [{**t, "head.weight": torch.randn(3, 16)} for t in tuned], METHOD, rules=RULES)
    assert shared.report().base_only == ("head.weight",)
    for state in (base, headed):
        shared.verify(state)
        assert shared.state_dict(state).keys() == base.keys()
    bare = dtrain.shared_base(base, tuned, METHOD, rules=RULES)
    assert not any(record.name.startswith("head") for record in bare.content.records)
    assert bare.content.fingerprint == shared.content.fingerprint


def test_names_of_tied_tensors_are_those_of_the_fine_tunes():
    """Files of tied models hold one of the names, here not the one that is first in the base."""
    base, tuned = family()
    for state in tuned:
        del state["tied.a"]
    shared = dtrain.shared_base(base, tuned, METHOD, rules=RULES)
    names = {record.name for record in shared.content.records}
    assert "tied.b" in names
    assert "tied.a" not in names
    assert not torch.equal(shared.state_dict(base)["tied.b"], base["tied.b"])
    delta = dtrain.compress(base, tuned[0], METHOD, rules=RULES)
    refer(delta, shared, only=["tied.b"]).verify(base)


def test_modules_and_files_make_the_same_vector(tmp_path):
    base, tuned = family()
    paths = []
    for number, state in enumerate([base, *tuned]):
        torch.save(state, tmp_path / f"{number}.pt")
        paths.append(tmp_path / f"{number}.pt")
    first = dtrain.shared_base(base, tuned, METHOD, rules=RULES)
    assert bytes_of(dtrain.shared_base(paths[0], paths[1:], METHOD, rules=RULES)) == bytes_of(first)
    modules = [module_of(state) for state in (base, *tuned)]
    assert bytes_of(dtrain.shared_base(modules[0], modules[1:], METHOD, rules=RULES)) == bytes_of(first)


@pytest.mark.parametrize("lam", [0.7, 1.3, 0.0, -2.5, 1e-30])
def test_a_reference_is_lam_times_the_shared_payloads(lam):
    """((W0 + lam b) + eta C(r)), every step rounded as the file format says, by hand."""
    base, shared, delta = task(lam)
    state = delta.state_dict(base)
    for name in MATRICES:
        value, own = base[name], record_of(delta, name).payloads[1:]
        wide = torch.promote_types(value.dtype, torch.float32)
        total = value.to(wide).flatten()
        factor = float(torch.tensor(lam, dtype=torch.float32))
        scaled = [(p, float(torch.tensor(p.scale * factor).float())) for p in record_of(shared, name).payloads]
        for payload, scale in [*scaled, *((p, p.scale) for p in own)]:
            found = decode(payload, name, value.shape)
            step = torch.zeros(value.numel(), dtype=wide)
            step[found.positions] = found.values.to(wide) * scale
            total[found.positions] = (total + step)[found.positions]
        assert raw(state[name]) == raw(total.to(value.dtype).view(value.shape)), name


@pytest.mark.parametrize("lam", [0.7, -2.5])
def test_the_reference_decoder_agrees(lam):
    base, shared, delta = task(lam)
    file = reference_decoder.parse(bytes(bytes_of(delta)))
    assert file.shared == file_digest(shared.content)
    file = reference_decoder.resolve(file, bytes(bytes_of(shared)))
    state = delta.state_dict(base)
    for name in MATRICES:
        assert reference_decoder.agrees(file.records[name], raw(base[name]), raw(state[name])), name


def test_several_shared_payloads_and_none_of_its_own():
    base, shared, delta = task()
    twice = encode(Pipeline(quantise=HALF.quantise, transform=Transposed()), "matrix", torch.randn(24, 16))
    shared = Delta(with_record(shared.content, "matrix", payloads=(*record_of(shared, "matrix").payloads, twice)))
    content = with_record(delta.content, "matrix", payloads=record_of(delta, "matrix").payloads[:1])
    delta = Delta(replace(content, shared=file_digest(shared.content)), shared=shared.content)
    file = reference_decoder.resolve(reference_decoder.parse(bytes(bytes_of(delta))), bytes(bytes_of(shared)))
    assert len(file.records["matrix"].payloads) == 2
    assert reference_decoder.rebuild(file.records["matrix"], raw(base["matrix"])) == raw(
        delta.state_dict(base)["matrix"]
    )


def test_apply_and_remove_bit_for_bit():
    base, _, delta = task()
    module = module_of({**base, "head.weight": torch.randn(3, 16), "head.bias": torch.randn(3)})
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for _ in range(2):
        delta.apply_(module)
        expected = delta.state_dict(base)
        found = module.state_dict()
        assert module.tied.a is module.tied.b
        assert same_bits({name: found[name] for name in expected}, expected)
        delta.remove_(module)
        assert same_bits(dict(module.state_dict()), before)


def test_the_file_beside_it_is_found(tmp_path):
    base, shared, delta = task()
    shared.save(tmp_path / "zz family.safetensors")
    delta.save(tmp_path / "task.safetensors")
    (tmp_path / "a folder.safetensors").mkdir()
    (tmp_path / "b empty.safetensors").write_bytes(b"")
    (tmp_path / "c other.safetensors").write_bytes(bytes_of(tiny()[1]))
    loaded = dtrain.load(tmp_path / "task.safetensors")
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))
    assert loaded.content.shared == (tmp_path / "zz family.safetensors").read_bytes()[-32:]
    assert bytes_of(loaded) == (tmp_path / "task.safetensors").read_bytes()


@pytest.mark.parametrize("given", ["path", "text", "delta"])
def test_the_file_can_be_given(tmp_path, given):
    base, shared, delta = task()
    (tmp_path / "elsewhere").mkdir()
    path = tmp_path / "elsewhere" / "family"
    shared.save(path)
    delta.save(tmp_path / "task.safetensors")
    loaded = dtrain.load(tmp_path / "task.safetensors", {"path": path, "text": str(path), "delta": shared}[given])
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))


def test_a_file_without_references_needs_none(tmp_path):
    base, delta = tiny()
    delta.save(tmp_path / "plain")
    loaded = dtrain.load(tmp_path / "plain", shared=tmp_path / "not there")
    assert loaded.shared is None
    assert loaded.resolved is loaded.content
    loaded.verify(base)


def test_a_reference_costs_a_scale():
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, Dare(keep=0.4), rules=RULES)
    alone = dtrain.compress(base, tuned[0], METHOD, rules=RULES)
    delta = refer(alone, shared)
    sizes = [sum(record.payload_bytes for record in d.content.records) for d in (alone, delta)]
    assert sizes[0] == sizes[1]
    # The hash, the pipeline, a scale per tensor, a pipeline's number per kind, and some bytes of padding and lengths.
    assert 0 < delta.file_bytes() - alone.file_bytes() <= 32 + 4 + 5 * len(MATRICES) + 16


def test_the_report_names_the_other_file():
    _, shared, delta = task()
    report = delta.report()
    assert report.file_bytes == len(bytes_of(delta))
    assert report.shared == file_digest(shared.content).hex()
    assert report.shared_bytes == shared.file_bytes()
    assert report.as_dict()["shared"] == report.shared
    text = " ".join(str(report).split())
    assert f"needs the shared file of {shared.file_bytes():,} bytes, SHA-256 {report.shared}, not counted here" in text
    assert "shared" not in str(shared.report())
    kept = {row.kind: row.kept for row in report.rows}
    alone = Delta(replace(delta.content, records=tuple(_own(r) for r in delta.content.records), shared=b""))
    assert kept == {row.kind: row.kept for row in alone.report().rows}


def _own(record):
    return replace(record, payloads=tuple(p for p in record.payloads if p.pipeline != SHARED))


def refusal(path, shared=None):
    with pytest.raises(ArtifactError, match=r"shared file: ") as caught:
        dtrain.load(path, shared)
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith(".")
    return str(caught.value)


def test_a_missing_shared_file_says_what_to_do(tmp_path):
    _, shared, delta = task()
    delta.save(tmp_path / "task.safetensors")
    digest = file_digest(shared.content).hex()
    assert f"no .safetensors file beside it ends with the SHA-256 {digest}" in refusal(tmp_path / "task.safetensors")
    shared.save(tmp_path / "shared.bin")  # not looked at: only .safetensors files are
    assert "load(path, shared=...)" in refusal(tmp_path / "task.safetensors")
    with pytest.raises(ArtifactError, match="gone: cannot be read"):
        dtrain.load(tmp_path / "task.safetensors", tmp_path / "gone")
    with pytest.raises(ArtifactError, match=f"it refers to the file of SHA-256 {digest}"):
        Delta(delta.content)


def test_another_shared_file_is_refused(tmp_path):
    base, tuned = family()
    _, shared, delta = task()
    delta.save(tmp_path / "task.safetensors")
    other = dtrain.shared_base(base, tuned, Dare(keep=0.4, seed=1), merge="elect", rules=RULES)
    found, wanted = file_digest(other.content).hex(), file_digest(shared.content).hex()
    assert f"SHA-256 {wanted}, and was given that of {found}" in refusal(tmp_path / "task.safetensors", other)
    damaged = bytes_of(shared)
    damaged[-40] ^= 1
    (tmp_path / "shared.safetensors").write_bytes(damaged)
    with pytest.raises(ArtifactError, match=r"shared\.safetensors(, tensor .*)?: checksum"):
        dtrain.load(tmp_path / "task.safetensors")


def hostile(change, task_change=lambda content: content):
    """Return the bytes of a task's file and of a shared file that was changed before it was hashed."""
    _, shared, delta = task()
    family_content = change(shared.content)
    content = task_change(replace(delta.content, shared=file_digest(family_content)))
    return b"".join(dtrain.artifact.pack_file(content)), b"".join(dtrain.artifact.pack_file(family_content))


def without(name):
    return lambda content: replace(content, records=tuple(r for r in content.records if r.name != name))


def chained(content):
    return with_record(content, "matrix", bytes(32), payloads=(Payload(SHARED, EMPTY, 1.0),))


def many(content):
    payload = encode(HALF, "matrix", torch.randn(24, 16))
    return with_record(content, "matrix", payloads=(payload,) * 255)


def loud(content):
    payload = encode(HALF, "matrix", torch.randn(24, 16))
    return with_record(content, "matrix", payloads=(replace(payload, scale=3e38),))


def loud_task(content):
    return with_record(content, "matrix", payloads=(Payload(SHARED, EMPTY, 2.0),))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("matrix"), "tensor 'matrix': shared file: the shared file holds no change of this tensor"),
        (lambda c: with_record(c, "matrix", payloads=()), "holds no change of this tensor"),
        (lambda c: with_record(c, "matrix", role=Role.SAME, payloads=()), "holds no change of this tensor"),
        (lambda c: with_record(c, "matrix", digest=bytes(DIGEST_BYTES)), "made from another base"),
        (lambda c: with_record(c, "matrix", shape=(16, 24)), "made from another base"),
        (chained, "itself refers to another"),
        (many, "255 shared payloads and 1 of its own are more than 255"),
    ],
    ids=["absent", "no payload", "unchanged", "another base", "another shape", "a chain", "too many payloads"],
)
def test_shared_files_that_do_not_fit_are_refused(tmp_path, change, words):
    own, other = hostile(change)
    (tmp_path / "task.safetensors").write_bytes(own)
    (tmp_path / "shared.safetensors").write_bytes(other)
    assert words in refusal(tmp_path / "task.safetensors")
    with pytest.raises((AssertionError, KeyError)):
        reference_decoder.resolve(reference_decoder.parse(own), other)


def test_a_product_of_scales_must_fit(tmp_path):
    own, other = hostile(loud, loud_task)
    (tmp_path / "task.safetensors").write_bytes(own)
    (tmp_path / "shared.safetensors").write_bytes(other)
    assert "overflows float32" in refusal(tmp_path / "task.safetensors")


def test_a_file_that_refers_to_itself_cannot_be(tmp_path):
    """Its own hash would have to be in it; the nearest thing is a chain."""
    _, _, delta = task()
    with pytest.raises(ArtifactError, match="shared file: "):
        Delta(delta.content, shared=delta.content)


def test_contents_that_contradict_themselves_are_refused():
    _, _, delta = task()
    with pytest.raises(InputError, match="8 tensors refer to a shared file, but its SHA-256 has 0 bytes"):
        replace(delta.content, shared=b"")
    with pytest.raises(InputError, match="0 tensors refer to a shared file, but its SHA-256 has 32 bytes"):
        Content((), bytes(32), {}, bytes(32))
    reference = Payload(SHARED, EMPTY, 1.0)
    with pytest.raises(InputError, match="stands behind another payload"):
        with_record(delta.content, "matrix", payloads=(reference, reference))
    with pytest.raises(InputError, match="no data of its own"):
        Payload(SHARED, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(InputError, match="no values of its own"):
        Pipeline(quantise=Shared(), transform=Transposed())


def test_a_reference_by_itself_is_no_payload():
    with pytest.raises(InputError, match="refers to another file"):
        encode(SHARED, "w", torch.randn(2, 2))
    with pytest.raises(ValueError, match="not put in its place"):
        decode(Payload(SHARED, EMPTY), "w", (2, 2))
    assert kept_values(Payload(SHARED, EMPTY), (2, 2)) == 0


def test_the_smallest_file_with_a_reference():
    """By hand after FORMAT.md: one float32 tensor `w` of two elements, shifted by half of b."""
    digest = reference_decoder.digest("float32", [2], bytes(8))
    half = b"\0\x3c\0\xc0"  # 1.0 and -2.0
    start = digest[:DIGEST_BYTES]
    family = craft.build(_finger(craft.manifest(records=[craft.record(data=[half], digest=start)])), half)
    table = craft.manifest(
        [craft.SHARED_PIPELINE],
        records=[craft.record(data=[None], scale=0.5, digest=start)],
        shared=bytes(family[-32:]),
    )
    delta = Delta(unpack_file(craft.build(_finger(table), b"")), shared=unpack_file(family))
    assert delta.state_dict({"w": torch.zeros(2)})["w"].tolist() == [0.5, -1.0]


def _finger(table):
    digest = reference_decoder.digest("float32", [2], bytes(8))
    record = reference_decoder.Record("w", 0, "float32", [2], digest[:DIGEST_BYTES], [])
    file = reference_decoder.File({}, b"", {"w": record}, None)
    return reference_decoder.fingerprint(file, {"w": bytes(8)}) + table[32:]


def test_arguments():
    base, tuned = family()
    for models in ([], tuned[:1], "model.safetensors", tuned[0]):
        with pytest.raises(InputError, match="a list of two models or more"):
            dtrain.shared_base(base, models, METHOD, rules=RULES)
    with pytest.raises(InputError, match="`merge` must be 'mean' or 'elect', got 'max'"):
        dtrain.shared_base(base, tuned, METHOD, merge="max", rules=RULES)
    with pytest.raises(InputError, match="`method` must be a method"):
        dtrain.shared_base(base, tuned, "BitDelta", rules=RULES)
    with pytest.raises(InputError, match="Lossless keeps the bits of one model"):
        dtrain.shared_base(base, tuned, dtrain.Lossless(), rules=RULES)
    for method in (Dbms(), dtrain.Wanda(keep=0.1)):
        with pytest.raises(NeedsDataError, match=f"{type(method).__name__} asks for .* made without data"):
            dtrain.shared_base(base, tuned, method, rules=RULES)
    with pytest.raises(InputError, match="change no tensor in common"):
        dtrain.shared_base(base, tuned, METHOD, rules=replace(RULES, include=["steps"]))
    with pytest.raises(InputError, match="equals its base"):
        dtrain.shared_base(base, [tuned[0], base], METHOD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("merge", ["mean", "elect"])
def test_values_that_are_no_numbers_are_refused(value, merge):
    base, tuned = family()
    tuned[1]["matrix"][3, 4] = value
    with pytest.raises(InputError, match="tensor 'matrix' holds NaN or inf in one of the fine-tunes"):
        dtrain.shared_base(base, tuned, METHOD, merge=merge, rules=RULES)


METHODS = [BitDelta(), dtrain.ComPEFT(keep=0.2), dtrain.SeededSign(), dtrain.Ecsq(), DareX(keep=0.1)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_any_method_without_data_makes_a_vector(method, tmp_path):
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, method, rules=RULES)
    assert shared.content.metadata["method"] == as_base_vector(method).describe()
    assert shared.content.metadata["shared"] == {"merge": "mean", "finetunes": 3}
    delta = refer(dtrain.compress(base, tuned[1], dtrain.SeededSign(seed=5), rules=RULES), shared, 0.9, ["matrix"])
    shared.save(tmp_path / "family.safetensors")
    delta.save(tmp_path / "task.safetensors")
    loaded = dtrain.load(tmp_path / "task.safetensors")
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))


@pytest.mark.parametrize("method", [dtrain.SeededSign(keep=0.2), DareX(keep=0.2), DareX(keep=0.2, q=0.5)], ids=repr)
def test_a_vector_draws_other_masks_than_a_delta_and_is_not_blown_up(method):
    """With one mask for both, DBMS has but one scale; unbiased by 1/keep, b would be longer than what it stands for."""
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, method, rules=RULES)
    alone = dtrain.compress(base, tuned[0], replace(method, q="keep"), rules=RULES)
    size = base["matrix"].numel()
    (vector,), (delta,) = (record_of(found, "matrix").payloads for found in (shared, alone))
    first, second = (decode(payload, "matrix", (24, 16)).positions for payload in (vector, delta))
    assert not torch.equal(first, second)
    mean = sum(state["matrix"] - base["matrix"] for state in tuned).flatten() / 3
    found = decode(vector, "matrix", (24, 16)).dense(size) * vector.scale
    assert float(found.norm()) < float(mean.norm())


@pytest.mark.parametrize("source", ["delta", "path"])
def test_dbms_stores_a_reference(tmp_path, source):
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, dtrain.SeededSign(keep=0.25), rules=RULES)
    shared.save(tmp_path / "family.safetensors")
    given = shared if source == "delta" else tmp_path / "family.safetensors"
    method = Dbms(host=dtrain.SeededSign(keep=0.25), source="shared", lam=0.9, eta=0.5)
    delta = dtrain.compress(base, tuned[0], method, rules=RULES, shared=given)
    used = {record.name: record.payloads for record in delta.content.records if SHARED in pipelines(record)}
    assert used.keys() == {record.name for record in shared.content.records if record.payloads}
    assert {payloads[0].scale for payloads in used.values()} == {float(torch.tensor(0.9, dtype=torch.float32))}
    delta.save(tmp_path / "task.safetensors")
    loaded = dtrain.load(tmp_path / "task.safetensors")
    assert same_bits(loaded.state_dict(base), delta.state_dict(base))
    assert bytes_of(loaded) == bytes_of(delta)


def pipelines(record):
    return [payload.pipeline for payload in record.payloads]


def test_dbms_refuses_a_vector_that_does_not_fit():
    base, tuned = family()
    method = Dbms(host=dtrain.SeededSign(keep=0.25), source="shared", lam=0.9, eta=0.5)
    shared = dtrain.shared_base(base, tuned, dtrain.SeededSign(keep=0.25), rules=RULES)
    task = dtrain.compress(base, tuned[0], method, rules=RULES, shared=shared)
    with pytest.raises(ArtifactError, match="shared file: the shared file itself refers to another"):
        dtrain.compress(base, tuned[0], method, rules=RULES, shared=task)
    for other in (torch.randn(24, 16), torch.randn(12, 16)):
        change = {"matrix": other + 0.01}
        with pytest.raises(ArtifactError, match=r"tensor 'matrix': shared file: .* made from another base"):
            dtrain.compress({**base, "matrix": other}, tuned[0] | change, method, rules=RULES, shared=shared)


def test_rules_have_their_say():
    base, tuned = family()
    shared = dtrain.shared_base(base, tuned, METHOD, rules=Rules(whole=["head.*"], include=["matrix", "bf16"]))
    assert {record.name for record in shared.content.records if record.payloads} == {"matrix", "bf16"}
    assert Path(str(shared.origin)).name == "delta"
