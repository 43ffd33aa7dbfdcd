"""A small writer of delta files after FORMAT.md, for files that dtrain itself would never write."""

import hashlib
import json
import struct
import zlib

PLAIN, ALL, FLOAT16, PACKED, ZSTD, RANS = b"\0", b"\0", b"\0", b"\0", b"\1", b"\2"
INDEXED = b"\5"


def varint(value):
    out = bytearray()
    while value >= 128:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def listing(items):
    return varint(len(items)) + b"".join(items)


def pipeline(transform=PLAIN, select=ALL, quantise=FLOAT16, code=PACKED):
    return transform + select + quantise + code


F16 = pipeline()


def bernoulli(keep, seed=0):
    return b"\1" + struct.pack("<dQ", keep, seed)


def bits(width):
    return b"\4" + bytes([width])


def dct(patch):
    return b"\1" + bytes([patch])


def low_rank(rank, first=0):
    return b"\2" + struct.pack("<II", rank, first)


def groups(size, kept, seed=0):
    return b"\3" + struct.pack("<IIQ", size, kept, seed)


def units(unit, block, keep, seed=0):
    return b"\4" + struct.pack("<BIdQ", unit, block, keep, seed)


def sign(group=0):
    return b"\2" + struct.pack("<I", group)


def uniform(width, group=0):
    return b"\3" + struct.pack("<BI", width, group)


def dead_zone(zone, top):
    return b"\5" + struct.pack("<dB", zone, top)


def affine(width, group=0):
    return b"\6" + struct.pack("<BI", width, group)


def mixed(group, fill=1):
    return b"\7" + struct.pack("<IB", group, fill)


SHARED_PIPELINE = pipeline(quantise=b"\x08")


def parts(high):
    return b"\3" + bytes([high])


def kind(role=0, dtype=0, shape=(2,), pipelines=(0,)):
    return bytes([role, dtype]) + listing([varint(n) for n in shape]) + listing([varint(p) for p in pipelines])


def record(name=b"w", data=(b"\0\0\0\0",), *, kind=0, scale=1.0, code=None, digest=bytes(4)):
    back, prefix, suffix = code or (0, 0, 0)
    head = varint(back) + varint(prefix) + varint(suffix) + varint(len(name)) + name + varint(kind) + digest
    return head + b"".join(map(_payload, [scale] * len(data), data))


def _payload(scale, data):
    """What a record says of a payload; of None, a reference to the shared file."""
    head = struct.pack("<f", scale)
    return head if data is None else head + struct.pack("<I", zlib.crc32(data)) + varint(len(data))


def manifest(pipelines=(F16,), kinds=None, records=None, shared=b""):
    return bytes(32) + listing(pipelines) + shared + listing(kinds or [kind()]) + listing(records or [record()])


def seal(body):
    """Close a file whose last 32 bytes are missing."""
    return bytearray(body + hashlib.sha256(body).digest())


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def header(manifest_size, payload_size, provenance='{"format":1}', change=None):
    stops = [0, manifest_size, manifest_size + payload_size, manifest_size + payload_size + 32]
    table = {"__metadata__": {"dtrain": provenance}}
    for name, start, stop in zip(("manifest", "payload", "sha256"), stops, stops[1:], strict=False):
        table[name] = {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
    if change:
        change(table)
    return wrap(canonical(table).encode())


def wrap(text):
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def build(table=None, payload=b"\0\0\0\0", **options):
    """One well-formed file of `table` and `payload`: by default one float32 tensor `w` of two elements."""
    table = manifest() if table is None else table
    return seal(header(len(table), len(payload), **options) + table + payload)
