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
from tests.artifact.craft import build, kind, manifest, record, varint
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


MANIFESTS = {
    "empty": b"",
    "fingerprint only": bytes(32),
    "left over": manifest() + b"\0",
    "overlong number": bytes(32) + b"\x81\0" + manifest()[33:],
    "endless number": bytes(32) + b"\x80" * 20,
    "64-bit number": bytes(32) + varint(2**64 - 1),
    "a million pipelines": bytes(32) + varint(10**6),
    "unknown select": manifest([b"\x09" + craft.FLOAT16 + craft.PACKED]),
    "unknown quantise": manifest([craft.ALL + b"\x09" + craft.PACKED]),
    "unknown code": manifest([craft.ALL + craft.FLOAT16 + b"\x09"]),
    "keep of zero": manifest([craft.bernoulli(0.0) + b"\0\0"]),
    "keep of one": manifest([craft.bernoulli(1.0) + b"\0\0"]),
    "keep NaN": manifest([craft.bernoulli(float("nan")) + b"\0\0"]),
    "17 bits": manifest([craft.ALL + b"\3\x11" + craft.PACKED]),
    "width of 3": manifest([craft.ALL + craft.bits(3) + craft.PACKED], [kind(role=1)]),
    "unknown role": manifest(kinds=[kind(role=6)]),
    "unknown dtype": manifest(kinds=[kind(dtype=19)]),
    "rank of 65": manifest(kinds=[kind(shape=[1] * 65)]),
    "huge shape": manifest(kinds=[kind(shape=[2**40, 2**40])]),
    "huge shape times zero": manifest(kinds=[kind(shape=[2**40, 2**40, 0])]),
    "added to integers": manifest(kinds=[kind(dtype=8)]),
    "added bits": manifest([craft.ALL + craft.bits(4) + craft.PACKED]),
    "xor without payload": manifest(kinds=[kind(role=1, pipelines=())], records=[record(data=())]),
    "xor of floats": manifest(kinds=[kind(role=1)]),
    "xor of another width": manifest([craft.ALL + craft.bits(2) + craft.PACKED], [kind(role=1)]),
    "xor behind a mask": manifest([craft.bernoulli(0.5) + craft.bits(4) + craft.PACKED], [kind(role=1, shape=[1])]),
    "whole behind a mask": manifest(
        [craft.bernoulli(0.5) + craft.bits(4) + craft.PACKED], [kind(role=2, shape=[1])], [record(digest=b"")]
    ),
    "whole, coded": manifest([craft.ALL + craft.bits(4) + craft.ZSTD], [kind(role=2)], [record(digest=b"")]),
    "same with payload": manifest(kinds=[kind(role=3)]),
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
    table = manifest([craft.ALL + craft.bits(4) + craft.PACKED], [kind(role=2, shape=[1])], [record(digest=b"")])
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


def applied(payload, pipeline=craft.F16, **options):
    base = {"w": torch.zeros(2)}
    digest = reference_decoder.digest("float32", [2], bytes(8))
    table = manifest([pipeline], [kind(**options)], [record(data=[payload], digest=digest[:8])])
    name = b"\1\0\0\0w"
    table = hashlib.sha256(name + digest).digest() + table[32:]
    return dtrain.Delta(unpack_file(build(table, payload))).state_dict(base)["w"].tolist()


FRAME = bytes.fromhex("28b52ffd20042100000000") + b"\0<"


def test_a_good_payload_applies():
    assert applied(b"\0\0\0\x3c") == [0.0, 1.0]


@pytest.mark.parametrize(
    ("payload", "pipeline"),
    [
        (b"", craft.F16),
        (b"\0\0\0", craft.F16),
        (b"\0\0\0\0\0\0", craft.F16),
        (b"\xff", craft.ALL + b"\2" + craft.PACKED),  # two signs and six bits that must be zero
        (b"", craft.ALL + craft.FLOAT16 + craft.ZSTD),
        (b"no frame", craft.ALL + craft.FLOAT16 + craft.ZSTD),
        (FRAME[:8], craft.ALL + craft.FLOAT16 + craft.ZSTD),
        (FRAME + b"x", craft.ALL + craft.FLOAT16 + craft.ZSTD),
    ],
    ids=["none", "too few", "too many", "filled", "no bytes", "no frame", "cut frame", "bytes behind the frame"],
)
def test_bad_payloads_are_refused_by_name(payload, pipeline):
    with pytest.raises(ArtifactError, match=r"tensor 'w': payload: "):
        applied(payload, pipeline)
