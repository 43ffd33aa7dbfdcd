"""The file: small, readable by others, the same everywhere, and nothing runs when it is read."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import dtrain
from dtrain import ArtifactError, Dare, DareX, Lossless
from dtrain.artifact import DIGEST_BYTES, Content, Record, Role, pack_file, unpack_file
from dtrain.difference import fingerprint
from dtrain.stages import (
    Affine,
    All,
    Bernoulli,
    BFloat16,
    BlockDct,
    DeadZone,
    Float16,
    Groups,
    Indexed,
    LowRank,
    Mixed,
    Packed,
    Parts,
    Pipeline,
    Rans,
    Sign,
    Stratified,
    Transposed,
    Uniform,
    Units,
    Zstd,
    encode,
    value_format,
)
from dtrain.weights import digest
from tests.artifact import reference_decoder
from tests.methods.settings import bytes_of, raw, tiny


def transformer(layers):
    """Names of a BERT-like encoder, every matrix 8 x 8."""
    parts = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    names = [f"encoder.layer.{i}.{part}" for i in range(layers) for part in parts]
    norms = [f"encoder.layer.{i}.{part}.LayerNorm" for i in range(layers) for part in ("attention.output", "output")]
    state = {f"{name}.weight": torch.zeros(8, 8) for name in ["embeddings.word_embeddings", *names]}
    state |= {f"{name}.bias": torch.zeros(8) for name in [*names, *norms]}
    return state | {f"{name}.weight": torch.zeros(8) for name in norms}


@pytest.mark.parametrize(("layers", "tensors"), [(12, 193), (24, 385)])
@pytest.mark.parametrize("method", [Dare(keep=0.5), DareX(keep=0.5, q="norm", values="sign"), Lossless()], ids=repr)
def test_the_manifest_is_small(layers, tensors, method):
    base = transformer(layers)
    delta = dtrain.compress(base, {k: v + torch.randn(v.shape) for k, v in base.items()}, method)
    payload = sum(record.payload_bytes for record in delta.content.records)
    assert len(base) == tensors
    assert delta.file_bytes() - payload <= 2048 + 32 * tensors


def test_a_mask_costs_no_bytes():
    base = {"w": torch.zeros(1024, 1024)}
    size = dtrain.compress(base, {"w": torch.randn(1024, 1024)}, Dare(keep=0.01)).file_bytes()
    assert 8 * size <= 1.02 * 16 * 0.01 * 2**20 + 8 * 2048


def test_safetensors_reads_it(tmp_path):
    _, delta = tiny()
    delta.save(tmp_path / "delta.safetensors")
    parts = load_file(tmp_path / "delta.safetensors")
    assert parts.keys() == {"manifest", "payload", "sha256"}
    assert bytes(parts["sha256"].tolist()) == hashlib.sha256(bytes_of(delta)[:-32]).digest()
    assert parts["payload"].numel() == sum(record.payload_bytes for record in delta.content.records)


def test_nothing_of_the_machine_is_in_it(tmp_path):
    _, delta = tiny()
    delta.save(tmp_path / "delta.safetensors")
    provenance = reference_decoder.parse((tmp_path / "delta.safetensors").read_bytes()).provenance
    assert provenance.keys() <= {"format", "method", "rules", "nominal_bits", "fit", "training"}
    assert str(tmp_path) not in json.dumps(provenance)


def test_missing_files_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ArtifactError, match=f"{path.name}: cannot be read"):
            dtrain.load(path)


@pytest.mark.parametrize("threads", [True, False])
def test_a_file_of_many_pieces(tmp_path, monkeypatch, threads):
    """The pieces are hashed in a thread, where there may be one: not at the interpreter's exit."""
    path = tmp_path / "delta"
    delta = dtrain.compress({"w": torch.zeros(1 << 20)}, {"w": torch.randn(1 << 20)}, Lossless())
    assert delta.save(path) > 3 << 20
    if not threads:

        def refuse(_):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr("threading.Thread.start", refuse)
    content = bytearray(path.read_bytes())
    assert b"".join(pack_file(dtrain.load(path).content)) == content
    for broken in (content[:-1], content + b"x", content[: 2 << 20], content[:-500] + b"x" + content[-499:]):
        path.write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"size|checksum"):
            dtrain.load(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_several_payloads_add_up_in_their_order(dtype):
    """No method writes them yet, but a file may hold them: W0 + s1 d1, rounded, + s2 d2, rounded, ..."""
    base, pipelines = torch.randn(40, 30).to(dtype), [Bernoulli(0.3, 1), All(), Stratified(0.7, 2)]
    payloads = [
        replace(encode(Pipeline(select, value_format(values)), "w", torch.randn(40, 30)), scale=scale)
        for select, values, scale in zip(pipelines, ("sign", "uniform4", "float16"), (0.3, 0.07, 1e-5), strict=True)
    ]
    record = Record("w", Role.ADD, dtype, (40, 30), digest(base)[:DIGEST_BYTES], tuple(payloads))
    delta = dtrain.Delta(Content((record,), fingerprint([("w", digest(base))])))
    found = reference_decoder.parse(bytes(bytes_of(delta))).records["w"]
    assert reference_decoder.rebuild(found, raw(base)) == raw(delta.state_dict({"w": base})["w"])


STAGED = [
    Pipeline(Bernoulli(0.3, 1), Sign(8), Packed(), Transposed()),
    Pipeline(Stratified(0.7, 2), Uniform(4, 5), Zstd()),
    Pipeline(Groups(8, 2, 3), Affine(4, 16), Parts(2)),
    Pipeline(Units(2, 4, 0.5, 4), DeadZone(0.6, 7), Rans()),
    Pipeline(Indexed(), BFloat16(), Zstd()),
    Pipeline(All(), Float16(), Packed(), LowRank(3, 1)),
    Pipeline(All(), Mixed(16, True), Zstd(), BlockDct(4)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("pipeline", STAGED, ids=repr)
def test_every_stage_survives_the_file(pipeline, dtype):
    base, chosen = torch.randn(10, 14).to(dtype), {}
    base[2:4] = -0.0
    if isinstance(pipeline.select, Indexed):
        chosen["positions"] = torch.arange(3, 140, 7)
    if isinstance(pipeline.quantise, Mixed):
        chosen["widths"] = torch.arange(12) % 9
    payload = encode(pipeline, "w", torch.randn(10, 14), **chosen)
    record = Record("w", Role.ADD, dtype, (10, 14), digest(base)[:DIGEST_BYTES], (payload,))
    delta = dtrain.Delta(Content((record,), fingerprint([("w", digest(base))])))
    read = unpack_file(bytes_of(delta))
    assert read.records[0].payloads[0].pipeline == pipeline
    assert bytes_of(dtrain.Delta(read)) == bytes_of(delta)
    (found,) = reference_decoder.parse(bytes_of(delta)).records.values()
    tuned = delta.state_dict({"w": base})["w"]
    assert reference_decoder.exact(found) == (not isinstance(pipeline.transform, (BlockDct, LowRank)))
    assert reference_decoder.agrees(found, raw(base), raw(tuned))
    tuned[-1, -1] += 0.1
    assert not reference_decoder.agrees(found, raw(base), raw(tuned))
