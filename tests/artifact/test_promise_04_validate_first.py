"""Promise 4: a file is validated before anything is allocated for it. Malformed files, crafted ones, and bombs."""

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain import ArtifactError, InputError
from dtrain.artifact import manifest as written
from dtrain.artifact import unpack_file
from tests.artifact import craft, damaged, reference_decoder
from tests.artifact.craft import build, kind, manifest, record
from tests.methods.settings import tiny

ROOT = Path(__file__).parents[2]


def test_crafted_files_start_from_a_good_one():
    (found,) = unpack_file(build()).records
    assert (found.name, found.shape, found.payload_bytes) == ("w", (2,), 4)
    assert reference_decoder.parse(bytes(build())).records["w"].shape == (2,)


@pytest.mark.parametrize("raw", damaged.HEADERS.values(), ids=damaged.HEADERS.keys())
def test_bad_headers_are_refused(raw):
    with pytest.raises(ArtifactError, match=r"^delta: (header|size|checksum|manifest|format version): "):
        unpack_file(raw)


@pytest.mark.parametrize("table", damaged.MANIFESTS.values(), ids=damaged.MANIFESTS.keys())
def test_bad_manifests_are_refused(table):
    with pytest.raises(ArtifactError, match="manifest: "):
        unpack_file(build(table))


@pytest.mark.parametrize("table", damaged.NEWER.values(), ids=damaged.NEWER.keys())
def test_what_a_later_version_says_is_not_called_damage(table):
    for text, advice in (("", "dtrain"), (',"requires":"1.2.3"', "'dtrain>=1.2.3'")):
        with pytest.raises(ArtifactError, match=f"format version: .* is unknown.*pip install -U {advice}$"):
            unpack_file(build(table, provenance=f'{{"format":1{text}}}'))


@pytest.mark.parametrize("text", damaged.VERSIONS.values(), ids=damaged.VERSIONS.keys())
def test_another_version_says_what_to_install(text):
    known = text == damaged.LATER
    with pytest.raises(ArtifactError, match=r"format version: found .*pip install -U ") as caught:
        unpack_file(build(provenance=text))
    assert str(caught.value).endswith("'dtrain>=1.10.0'" if known else "pip install -U dtrain")
    assert len(str(caught.value)) < 200


def test_a_later_version_may_have_other_tensors():
    with pytest.raises(ArtifactError, match=r"found 2, .* needs dtrain 1\.10\.0 or newer"):
        unpack_file(damaged.OTHER_TABLE)


def test_a_digest_of_whole_tensors_is_not_there():
    table = manifest([craft.pipeline(quantise=craft.bits(4))], [kind(role=2, shape=[1])], [record(digest=b"")])
    assert unpack_file(build(table)).records[0].digest == b""


def test_names_do_not_explode():
    """Each name may borrow all of the one before: a small file must not ask for memory far beyond its size."""
    long = 100_000
    records = [record(b"a" * long)] + [record(b"b", [b""], code=(1, long + i, 0)) for i in range(400)]
    raw = build(manifest(records=records))
    tracemalloc.start()
    try:
        with pytest.raises(ArtifactError):
            unpack_file(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20 * len(raw)


def applied(*payload, **options):
    return (
        dtrain.Delta(unpack_file(damaged.on_zeros(*payload, **options))).state_dict({"w": torch.zeros(2)})["w"].tolist()
    )


@pytest.mark.parametrize(
    ("payload", "stages", "values"),
    [
        (b"\0\0\0\x3c", craft.F16, [0.0, 1.0]),
        (damaged.FRAME, damaged.ZSTD, [0.0, 1.0]),
        (damaged.STREAM, damaged.RANS, [-1.0, 0.0]),
        (b"\1\0\1" + b"\0\2\0\1\1\1\0\0\0" + b"\0\x3c", damaged.INDEXED, [0.0, 1.0]),
        (b"\0", damaged.INDEXED, [0.0, 0.0]),
        (b"\1" + damaged.STREAM + b"\1" + b"\0", damaged.PARTS, [0.0, 1.0]),
    ],
    ids=["packed", "zstd", "rans", "indexed", "none indexed", "parts"],
)
def test_good_payloads_apply(payload, stages, values):
    """Written by hand from FORMAT.md."""
    assert applied(payload, stages) == values


@pytest.mark.parametrize(("payload", "stages"), damaged.PAYLOADS.values(), ids=damaged.PAYLOADS.keys())
def test_bad_payloads_are_refused_by_name(payload, stages):
    with pytest.raises(ArtifactError, match=r"tensor 'w': (payload|manifest): "):
        applied(payload, stages)


@pytest.mark.parametrize("limit", ["_MAX_PIPELINES", "_MAX_RECORDS", "_MAX_ALL_PAYLOADS"])
def test_limits_hold_for_writer_and_reader(monkeypatch, limit):
    _, delta = tiny()
    raw = build(manifest(records=[record(b"a"), record(b"b", [bytes(4)])]), bytes(8))
    raw = build(manifest([craft.F16] * 2)) if limit == "_MAX_PIPELINES" else raw
    monkeypatch.setattr(written, limit, 1)
    with pytest.raises(InputError, match=r"pipelines, tensors and payloads are more than .* Split"):
        delta.file_bytes()
    with pytest.raises(ArtifactError, match=r"manifest: .*(where 1 are the most|more than 1 payloads)"):
        unpack_file(raw)


@pytest.mark.parametrize(
    "metadata", [{"training": "x" * (1 << 20)}, {"a": [[[[[[[[{}]]]]]]]] * 2}], ids=["long", "deep"]
)
def test_metadata_that_no_reader_would_take_are_not_written(metadata):
    _, delta = tiny()
    for _ in range(0 if "training" in metadata else 30):
        metadata = {"deeper": metadata}
    delta.content.metadata.update(metadata)
    with pytest.raises(InputError, match=r"the metadata of a delta take .* nested more than 32 deep"):
        delta.file_bytes()


@pytest.mark.multiproc
def test_bombs_take_neither_memory_nor_time(tmp_path):
    """All of them in one process with 300 MiB to spare and 5 s of CPU time each; it prints a line for every bomb."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.artifact.bombs", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BOMB" not in done.stdout
    assert done.stdout.count("refused: ") + done.stdout.count("harmless: ") >= 15
