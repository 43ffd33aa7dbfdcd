"""Damaged, malicious and merely odd files, each by a title: what the corpora and the tests of refusals are made of."""

import hashlib
import struct

from tests.artifact import craft, reference_decoder
from tests.artifact.craft import build, kind, manifest, pipeline, record, varint

_SMALL = 1 << 12  # bytes: greater files are made when they are needed, and not checked in


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
    "provenance that is no text": build(change=lambda table: table["__metadata__"].update(dtrain={"format": 1})),
    "half a surrogate pair in provenance": build(provenance='{"a":"\\ud800","format":1}'),
    "provenance nested 33 deep": build(provenance='{"a":' + "[" * 32 + "]" * 32 + ',"format":1}'),
    "method that is no object": build(provenance='{"format":1,"method":"Dare"}'),
    "bits that are no number": build(provenance='{"format":1,"nominal_bits":true}'),
    "bits beyond any float": build(provenance='{"format":1,"nominal_bits":1' + "0" * 400 + "}"),
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

PIPELINES = {
    "patch of 1": {"transform": craft.dct(1)},
    "patch of 129": {"transform": craft.dct(129)},
    "rank of 0": {"transform": craft.low_rank(0)},
    "keep of zero": {"select": craft.bernoulli(0.0)},
    "keep of one": {"select": craft.bernoulli(1.0)},
    "keep NaN": {"select": craft.bernoulli(float("nan"))},
    "stratified keep next to one": {"select": b"\2" + struct.pack("<dQ", 1 - 2.0**-53, 0)},
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
    "too many pipelines": manifest([craft.F16] * (2**16 + 1)),
    **{name: manifest([pipeline(**stages)]) for name, stages in PIPELINES.items()},
    "rank of 65": manifest(kinds=[kind(shape=[1] * 65)]),
    "huge shape": manifest(kinds=[kind(shape=[2**40, 2**40])]),
    "huge shape times zero": manifest(kinds=[kind(shape=[2**40, 2**40, 0])]),
    "added to integers": manifest(kinds=[kind(dtype=8)]),
    "added bits": manifest([pipeline(quantise=craft.bits(4))]),
    "xor without payload": manifest(kinds=[kind(role=1, pipelines=())], records=[record(data=())]),
    "xor of floats": manifest(kinds=[kind(role=1)]),
    "xor of another width": manifest([pipeline(quantise=craft.bits(2))], [kind(role=1)]),
    "rank beyond the sides": manifest([pipeline(craft.low_rank(1, 1))]),
    "rank of an empty tensor": manifest([pipeline(craft.low_rank(1))], [kind(shape=[0, 5])]),
    "whole, coded": manifest([pipeline(quantise=craft.bits(4), code=craft.ZSTD)], [kind(role=2)], [record(digest=b"")]),
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
    "scale of bits": manifest([pipeline(quantise=craft.bits(4))], [kind(role=1)], [record(data=[bytes(8)], scale=2.0)]),
    "scale infinite": manifest(records=[record(scale=float("inf"))]),
    "payload beyond the end": manifest(records=[record(data=[bytes(5)])]),
    "payload left over": manifest(records=[record(data=[bytes(3)])]),
    "name not UTF-8": manifest(records=[record(b"\xff")]),
    "same name twice": manifest(records=[record(), record(data=[b""])]),
    "names out of order": manifest(records=[record(b"b"), record(b"a", [b""])]),
    "name before the first": manifest(records=[record(code=(1, 0, 0))]),
    "name borrows from nothing": manifest(records=[record(code=(0, 1, 0))]),
    "name borrows too much": manifest(records=[record(b"b"), record(b"c", [b""], code=(1, 1, 1))]),
}

#: What a later version of dtrain may write into a file of version 1, and what a later format looks like.
NEWER = {
    "unknown transform": manifest([pipeline(transform=b"\x04")]),
    "unknown select": manifest([pipeline(select=b"\x09")]),
    "unknown quantise": manifest([pipeline(quantise=b"\x09")]),
    "unknown code": manifest([pipeline(code=b"\x04")]),
    "unknown role": manifest(kinds=[kind(role=6)]),
    "unknown dtype": manifest(kinds=[kind(dtype=19)]),
}
LATER = '{"format":2,"requires":"1.10.0"}'
VERSIONS = {
    "format 2": '{"format":2}',
    "format 2 that says what it needs": LATER,
    "format 0": '{"format":0}',
    "format as text": '{"format":"1"}',
    "format null": '{"format":null}',
    "format 1.5": '{"format":1.5}',
    "format as a list": '{"format":[1]}',
    "needs a command": '{"format":2,"requires":"1; rm -rf ~"}',
    "needs a number": '{"format":2,"requires":3}',
    "needs other digits": '{"format":2,"requires":"\\u0661.0"}',
    "format of a thousand letters": '{"format":"' + "x" * 1000 + '"}',
}
#: A later format may have other tensors: its first words are all that a reader of version 1 may look at.
OTHER_TABLE = craft.seal(
    craft.wrap(craft.canonical({"__metadata__": {"dtrain": LATER}, "all": {}}).encode()) + bytes(9)
)

FRAME = bytes.fromhex("28b52ffd20042100000000") + b"\0<"
ZSTD, RANS = pipeline(code=craft.ZSTD), pipeline(quantise=craft.uniform(2), code=craft.RANS)
INDEXED, PARTS = pipeline(select=craft.INDEXED), pipeline(quantise=craft.affine(2), code=craft.parts(1))
# Precision 1, two shares of 1, one word: symbols 0 and 1, which uniform reads as -1 and 0.
STREAM = b"\1\2\1\1" + b"\1" + (1 << 24).to_bytes(4, "little")
#: Payloads of a tensor of two elements that cannot be what their pipeline says.
PAYLOADS = {
    "none": (b"", craft.F16),
    "too few": (b"\0\0\0", craft.F16),
    "too many": (b"\0\0\0\0\0\0", craft.F16),
    "filled": (b"\xff", pipeline(quantise=craft.sign())),  # two signs and six bits that must be zero
    "no frame at all": (b"", ZSTD),
    "no frame": (b"no frame", ZSTD),
    "cut frame": (FRAME[:8], ZSTD),
    "bytes behind the frame": (FRAME + b"x", ZSTD),
    "no stream": (b"", RANS),
    "cut stream": (STREAM[:-1], RANS),
    "bytes behind the stream": (STREAM + b"\0", RANS),
    "no positions": (b"", INDEXED),
    "more positions than elements": (b"\3\0\3", INDEXED),
    "position behind the end": (b"\1\0\1" + b"\0\3\0\0\1\1\2\0\0\0" + b"\0\x3c", INDEXED),
}


def on_zeros(payload, stages=craft.F16, *, name=b"w", pad=None, **options):
    """A file with one payload, a change of two float32 zeros."""
    digest = reference_decoder.digest("float32", [2], bytes(8))
    table = manifest([stages], [kind(**options)], [record(name, [payload], digest=digest[:4])], **(pad or {}))
    table = hashlib.sha256(len(name).to_bytes(4, "little") + name + digest).digest() + table[32:]
    return build(table, payload)


def critical():
    """Files that must be refused, with the sentence in `critical/expected.json`."""
    files = {f"header: {title}": data for title, data in HEADERS.items()}
    files |= {f"manifest: {title}": build(table) for title, table in MANIFESTS.items()}
    files |= {f"newer: {title}": build(table) for title, table in NEWER.items()}
    files |= {f"version: {title}": build(provenance=text) for title, text in VERSIONS.items()}
    files |= {"version: other tensors": OTHER_TABLE}
    files |= {f"payload: {title}": on_zeros(*payload) for title, payload in PAYLOADS.items()}
    good = on_zeros(b"\0\0\0\x3c")
    files |= {"copy: cut short": good[:-1], "copy: a byte more": good + b"\0", "copy: start only": good[:100]}
    files |= {"copy: a bit flipped": good[:-40] + bytes([good[-40] ^ 1]) + good[-39:]}
    return {title: bytes(data) for title, data in files.items() if len(data) < _SMALL}


def non_critical():
    """Files that dtrain would not write, and must read."""
    value, name = b"\0\0\0\x3c", "größe/../\0".encode()
    unused = manifest([craft.F16, craft.F16, ZSTD], [kind(), kind(role=3, pipelines=())])
    later = '{"fit":3,"format":1,"later":{"deep":[1,2.5,null,"\\u00e9"]},"requires":"99.0"}'
    return {
        "the plainest": bytes(on_zeros(value)),
        "unknown provenance": bytes(build(provenance=later)),
        "stages and kinds that nothing uses": bytes(build(unused)),
        "no tensor": bytes(build(bytes(32) + b"\0\0\0", b"")),
        "a change of no payload": bytes(build(manifest([], [kind(pipelines=())], [record(data=())]), b"")),
        "a name that is a path": bytes(build(manifest(records=[record(name)]))),
        "a wrong CRC": bytes(build(manifest(records=[record(data=[b"abcd"])]))),
        "a method that is markup": bytes(build(provenance='{"format":1,"method":{"name":"[/red]\\u001b[2J"}}')),
        "an empty name": bytes(build(manifest(records=[record(b"")]))),
        "a scale of minus zero": bytes(build(manifest(records=[record(scale=-0.0)]))),
        "names that borrow nothing": bytes(
            build(manifest(records=[record(b"a"), record(b"ab", code=(1, 0, 0))]), bytes(8))
        ),
        "provenance nested 32 deep": bytes(build(provenance='{"a":' + "[" * 31 + "]" * 31 + ',"format":1}')),
    }
