"""Damaged and malicious files: each is refused with a sentence, before anything is used or allocated."""

import hashlib
import json
import tracemalloc

import pytest
import torch

import dtrain
from dtrain import ArtifactError, Dare, Lossless
from dtrain.artifact import unpack_file
from tests.artifact import craft, reference_decoder
from tests.artifact.craft import build, kind, manifest, pipeline, record, varint
from tests.methods.settings import bytes_of, tiny


@pytest.mark.parametrize("method", [Dare(keep=0.5), Lossless()], ids=repr)
def test_every_truncation_is_found(method):
    raw = bytes_of(tiny(method)[1])
    for size in range(len(raw)):
        with pytest.raises(ArtifactError, match=r"^delta"):
            unpack_file(raw[:size])


@pytest.mark.parametrize("method", [Dare(keep=0.5), Lossless()], ids=repr)
def test_every_flipped_bit_is_found(method):
    raw = bytes_of(tiny(method)[1])
    for at in range(8 * len(raw)):
        damaged = raw.copy()
        damaged[at // 8] ^= 1 << at % 8
        with pytest.raises(ArtifactError):
            unpack_file(damaged)


@pytest.mark.parametrize("extra", [b"\0", b"{}", b"\0" * 64])
def test_bytes_behind_the_end_are_found(extra):
    with pytest.raises(ArtifactError, match="size"):
        unpack_file(bytes_of(tiny()[1]) + extra)


def test_parts_of_two_files_do_not_mix():
    """Payloads, manifests and headers swapped between two deltas of one shape, checksum over all repaired or not."""
    one, two = (bytes_of(tiny(Dare(keep=1, seed=seed))[1]) for seed in (0, 1))
    assert len(one) == len(two)
    start = 8 + int.from_bytes(one[:8], "little")
    middle = start + json.loads(one[8:start])["manifest"]["shape"][0]
    for cut in (start, middle, len(one) - 32):
        with pytest.raises(ArtifactError, match="checksum"):
            unpack_file(one[:cut] + two[cut:])
    with pytest.raises(ArtifactError, match=r"tensor 'a\.(bias|weight)': manifest: .*checksum"):
        unpack_file(craft.seal(one[:middle] + two[middle:-32]))


def test_crafted_files_start_from_a_good_one():
    (found,) = unpack_file(build()).records
    assert (found.name, found.shape, found.payload_bytes) == ("w", (2,), 4)
    assert reference_decoder.parse(bytes(build())).records["w"].shape == (2,)


@pytest.mark.parametrize("version", ["2", "99", "0", '"1"', "null", "1.5", "[1]"])
def test_another_version_says_what_to_install(version):
    with pytest.raises(ArtifactError, match=r"format version: found .*pip install -U dtrain"):
        unpack_file(build(provenance=f'{{"format":{version}}}'))


def test_unknown_provenance_is_ignored():
    raw = build(provenance='{"format":1,"later":{"deep":[1,2.5,null,"\\u00e9"]}}')
    assert unpack_file(raw).metadata["later"]["deep"][1] == 2.5


def text(value):
    return craft.seal(craft.wrap(value) + bytes(80))


TABLE = manifest()
HEADERS = {
    "empty": bytearray(),
    "seven bytes": bytearray(7),
    "zeros": bytearray(100),
    "size beyond the end": bytearray(b"\xff" * 8 + b"{}"),
    "99 MB of header": bytearray((99 << 20).to_bytes(8, "little") + b" " * (1 << 20)),
    "no JSON": text(b"hello"),
    "no object": text(b"[]"),
    "not UTF-8": text(b'{"\xff":1}'),
    "nested a hundred thousand deep": text(b"[" * 100_000 + b"]" * 100_000),
    "nested objects": text(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "nested provenance": build(provenance='{"a":' + "[" * 100_000 + "]" * 100_000 + ',"format":1}'),
    "another safetensors file": text(b'{"w":{"data_offsets":[0,80],"dtype":"U8","shape":[80]}}'),
    "no format": build(provenance="{}"),
    "duplicate key": craft.seal(
        craft.wrap(craft.header(len(TABLE), 4)[8:].rstrip().replace(b'"manifest"', b'"manifest":1,"manifest"'))
        + TABLE
        + bytes(4)
    ),
    "duplicate key in provenance": build(provenance='{"format":1,"format":1}'),
    "unsorted provenance": build(provenance='{"x":1,"format":1}'),
    "space in provenance": build(provenance='{"format": 1}'),
    "NaN in provenance": build(provenance='{"format":1,"x":NaN}'),
    "format true": build(provenance='{"format":true}'),
    "huge number in provenance": build(provenance='{"format":1,"x":' + "9" * 5000 + "}"),
    "another key": build(change=lambda table: table["__metadata__"].update(x="y")),
    "another tensor": build(change=lambda table: table.update(x=dict(table["payload"]))),
    "another dtype": build(change=lambda table: table["payload"].update(dtype="I8")),
    "another shape": build(change=lambda table: table["payload"].update(shape=[2, 2])),
    "negative size": craft.seal(craft.header(-8, len(TABLE) + 12) + TABLE + bytes(4)),
    "fractional size": craft.seal(craft.header(float(len(TABLE)), 4) + TABLE + bytes(4)),
    "boolean size": craft.seal(craft.header(True, len(TABLE) + 3) + TABLE + bytes(4)),
    "size as text": build(change=lambda table: table["payload"].update(shape=["4"])),
    "sizes of another file": craft.seal(craft.header(len(TABLE) + 1, 4) + TABLE + bytes(4)),
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS.keys())
def test_bad_headers_are_refused(raw):
    with pytest.raises(ArtifactError, match=r"^delta: (header|size|checksum|manifest|format version): "):
        unpack_file(raw)


PIPELINES = {
    "unknown transform": {"transform": b"\x04"},
    "unknown select": {"select": b"\x09"},
    "unknown quantise": {"quantise": b"\x09"},
    "unknown code": {"code": b"\x04"},
    "patch of 1": {"transform": craft.dct(1)},
    "patch of 129": {"transform": craft.dct(129)},
    "rank of 0": {"transform": craft.low_rank(0)},
    "keep of zero": {"select": craft.bernoulli(0.0)},
    "keep of one": {"select": craft.bernoulli(1.0)},
    "keep NaN": {"select": craft.bernoulli(float("nan"))},
    "group of 1": {"select": craft.groups(1, 1)},
    "group of 65537": {"select": craft.groups(65537, 1)},
    "group keeps none": {"select": craft.groups(8, 0)},
    "group keeps all": {"select": craft.groups(8, 8)},
    "unit 3": {"select": craft.units(3, 1, 0.5)},
    "row of 2": {"select": craft.units(0, 2, 0.5)},
    "block of 0": {"select": craft.units(2, 0, 0.5)},
    "block of 1025": {"select": craft.units(2, 1025, 0.5)},
    "units keep NaN": {"select": craft.units(0, 1, float("nan"))},
    "groups of patches": {"transform": craft.dct(8), "select": craft.groups(8, 1)},
    "units of factors": {"transform": craft.low_rank(1), "select": craft.units(0, 1, 0.5)},
    "uniform of 1 bit": {"quantise": craft.uniform(1)},
    "uniform of 17 bits": {"quantise": craft.uniform(17)},
    "affine of 0 bits": {"quantise": craft.affine(0)},
    "affine of 17 bits": {"quantise": craft.affine(17)},
    "width of 3": {"quantise": craft.bits(3)},
    "bits behind a mask": {"select": craft.bernoulli(0.5), "quantise": craft.bits(4)},
    "shared behind a mask": {"select": craft.bernoulli(0.5), "quantise": b"\x08"},
    "shared and transformed": {"transform": b"\3", "quantise": b"\x08"},
    "shared and coded": {"quantise": b"\x08", "code": craft.ZSTD},
    "bits transformed": {"transform": b"\3", "quantise": craft.bits(4)},
    "zone of 0": {"quantise": craft.dead_zone(0.0, 3)},
    "zone NaN": {"quantise": craft.dead_zone(float("nan"), 3)},
    "top of 0": {"quantise": craft.dead_zone(0.5, 0)},
    "top of 128": {"quantise": craft.dead_zone(0.5, 128)},
    "mixed groups of 0": {"quantise": craft.mixed(0)},
    "mixed without patches": {"quantise": craft.mixed(64)},
    "mixed with other patches": {"transform": craft.dct(4), "quantise": craft.mixed(64)},
    "mixed behind a mask": {"transform": craft.dct(8), "select": craft.INDEXED, "quantise": craft.mixed(64)},
    "fill of 2": {"transform": craft.dct(8), "quantise": craft.mixed(64, 2)},
    "rans of 13 bits": {"quantise": craft.uniform(13), "code": craft.RANS},
    "parts of 0 bits": {"quantise": craft.affine(4), "code": craft.parts(0)},
    "parts of 9 bits": {"quantise": craft.affine(16), "code": craft.parts(9)},
    "parts of more bits than there are": {"quantise": craft.affine(4), "code": craft.parts(5)},
    "parts of another quantiser": {"quantise": craft.uniform(4), "code": craft.parts(1)},
}
MANIFESTS = {
    "empty": b"",
    "fingerprint only": bytes(32),
    "left over": manifest() + b"\0",
    "overlong number": bytes(32) + b"\x81\0" + manifest()[33:],
    "endless number": bytes(32) + b"\x80" * 20,
    "64-bit number": bytes(32) + varint(2**64 - 1),
    "a million pipelines": bytes(32) + varint(10**6),
    **{name: manifest([pipeline(**stages)]) for name, stages in PIPELINES.items()},
    "unknown role": manifest(kinds=[kind(role=6)]),
    "unknown dtype": manifest(kinds=[kind(dtype=19)]),
    "rank of 65": manifest(kinds=[kind(shape=[1] * 65)]),
    "huge shape": manifest(kinds=[kind(shape=[2**40, 2**40])]),
    "huge shape times zero": manifest(kinds=[kind(shape=[2**40, 2**40, 0])]),
    "added to integers": manifest(kinds=[kind(dtype=8)]),
    "added bits": manifest([craft.pipeline(quantise=craft.bits(4))]),
    "xor without payload": manifest(kinds=[kind(role=1, pipelines=())], records=[record(data=())]),
    "xor of floats": manifest(kinds=[kind(role=1)]),
    "xor of another width": manifest([craft.pipeline(quantise=craft.bits(2))], [kind(role=1)]),
    "rank beyond the sides": manifest([pipeline(craft.low_rank(1, 1))]),
    "rank of an empty tensor": manifest([pipeline(craft.low_rank(1))], [kind(shape=[0, 5])]),
    "whole, coded": manifest(
        [craft.pipeline(quantise=craft.bits(4), code=craft.ZSTD)], [kind(role=2)], [record(digest=b"")]
    ),
    "same with payload": manifest(kinds=[kind(role=3)]),
    "reference without a shared file": manifest([craft.SHARED_PIPELINE], records=[record(data=[None])]),
    "reference cut off": manifest([craft.SHARED_PIPELINE])[:50],
    "reference with bytes": manifest([craft.SHARED_PIPELINE], shared=bytes(32)),
    "reference behind another": manifest(
        [craft.SHARED_PIPELINE], [kind(pipelines=(0, 0))], [record(data=[None, None])], shared=bytes(32)
    ),
    "reference behind a payload": manifest(
        [craft.SHARED_PIPELINE, craft.F16], [kind(pipelines=(1, 0))], [record(data=[bytes(4), None])], shared=bytes(32)
    ),
    "reference in an xor": manifest([craft.SHARED_PIPELINE], [kind(role=1)], [record(data=[None])], shared=bytes(32)),
    "reference in a whole tensor": manifest(
        [craft.SHARED_PIPELINE], [kind(role=2)], [record(data=[None], digest=b"")], shared=bytes(32)
    ),
    "reference with a scale NaN": manifest(
        [craft.SHARED_PIPELINE], records=[record(data=[None], scale=float("nan"))], shared=bytes(32)
    ),
    "shared file that nothing refers to": manifest([craft.F16, craft.SHARED_PIPELINE], shared=bytes(32)),
    "pipeline beyond the list": manifest(kinds=[kind(pipelines=[1])]),
    "kind beyond the list": manifest(records=[record(kind=1)]),
    "scale NaN": manifest(records=[record(scale=float("nan"))]),
    "scale infinite": manifest(records=[record(scale=float("inf"))]),
    "payload beyond the end": manifest(records=[record(data=[bytes(5)])]),
    "payload left over": manifest(records=[record(data=[bytes(3)])]),
    "wrong CRC": manifest(records=[record(data=[b"abcd"])]),
    "name not UTF-8": manifest(records=[record(b"\xff")]),
    "same name twice": manifest(records=[record(), record(data=[b""])]),
    "names out of order": manifest(records=[record(b"b"), record(b"a", [b""])]),
    "name before the first": manifest(records=[record(code=(1, 0, 0))]),
    "name borrows from nothing": manifest(records=[record(code=(0, 1, 0))]),
    "name borrows too much": manifest(records=[record(b"b"), record(b"c", [b""], code=(1, 1, 1))]),
}


@pytest.mark.parametrize("table", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_bad_manifests_are_refused(table):
    with pytest.raises(ArtifactError, match="manifest: "):
        unpack_file(build(table))


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


def applied(payload, stages=craft.F16, **options):
    base = {"w": torch.zeros(2)}
    digest = reference_decoder.digest("float32", [2], bytes(8))
    table = manifest([stages], [kind(**options)], [record(data=[payload], digest=digest[:4])])
    name = b"\1\0\0\0w"
    table = hashlib.sha256(name + digest).digest() + table[32:]
    return dtrain.Delta(unpack_file(build(table, payload))).state_dict(base)["w"].tolist()


FRAME = bytes.fromhex("28b52ffd20042100000000") + b"\0<"
ZSTD, RANS = pipeline(code=craft.ZSTD), pipeline(quantise=craft.uniform(2), code=craft.RANS)
INDEXED, PARTS = pipeline(select=craft.INDEXED), pipeline(quantise=craft.affine(2), code=craft.parts(1))
# Precision 1, two shares of 1, one word: symbols 0 and 1, which uniform reads as -1 and 0.
STREAM = b"\1\2\1\1" + b"\1" + (1 << 24).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("payload", "stages", "values"),
    [
        (b"\0\0\0\x3c", craft.F16, [0.0, 1.0]),
        (FRAME, ZSTD, [0.0, 1.0]),
        (STREAM, RANS, [-1.0, 0.0]),
        (b"\1\0\1" + b"\0\2\0\1\1\1\0\0\0" + b"\0\x3c", INDEXED, [0.0, 1.0]),
        (b"\0", INDEXED, [0.0, 0.0]),
        (b"\1" + STREAM + b"\1" + b"\0", PARTS, [0.0, 1.0]),
    ],
    ids=["packed", "zstd", "rans", "indexed", "none indexed", "parts"],
)
def test_good_payloads_apply(payload, stages, values):
    """Written by hand from FORMAT.md."""
    assert applied(payload, stages) == values


@pytest.mark.parametrize(
    ("payload", "stages"),
    [
        (b"", craft.F16),
        (b"\0\0\0", craft.F16),
        (b"\0\0\0\0\0\0", craft.F16),
        (b"\xff", pipeline(quantise=craft.sign())),  # two signs and six bits that must be zero
        (b"", ZSTD),
        (b"no frame", ZSTD),
        (FRAME[:8], ZSTD),
        (FRAME + b"x", ZSTD),
        (b"", RANS),
        (STREAM[:-1], RANS),
        (STREAM + b"\0", RANS),
        (b"", INDEXED),
        (b"\3\0\3", INDEXED),
    ],
    ids=["none", "too few", "too many", "filled", "no bytes", "no frame", "cut frame", "bytes behind the frame"]
    + ["no stream", "cut stream", "bytes behind the stream", "no positions", "more positions than elements"],
)
def test_bad_payloads_are_refused_by_name(payload, stages):
    with pytest.raises(ArtifactError, match=r"tensor 'w': payload: "):
        applied(payload, stages)
