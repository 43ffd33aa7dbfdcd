"""A second, slow reader of delta files, written from `dtrain/artifact/FORMAT.md` alone.

Standard library and zstandard only: no torch, no numpy, nothing of dtrain. Every check is an `assert`.
"""

import hashlib
import json
import math
import struct
import zlib
from collections import namedtuple
from itertools import pairwise

from tests.artifact.reference_stages import Payload, Reader, check_pipeline, decode, single

ADD, XOR, WHOLE, SAME, DROP, BASE_ONLY = range(6)
WIDTHS = {  # bytes per value, in the order of the dtypes' numbers
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8, "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
DTYPES = list(WIDTHS)
EPSILON = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7, "float64": 2.0**-52}
STAGES = (  # the parameters of every transform, select, quantise and code
    ("", "B", "II", ""),
    ("", "dQ", "dQ", "IIQ", "BIdQ", ""),
    ("", "", "I", "BI", "B", "dB", "BI", "IB", ""),
    ("", "", "", "B"),
)

Record = namedtuple("Record", "name role dtype shape digest payloads")
File = namedtuple("File", "provenance fingerprint records shared")
REFERENCE = [(0,), (0,), (8,), (0,)]


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def parse(data: bytes) -> File:
    """Reads the whole file and makes every check that needs no base."""
    reader = Reader(data)
    header = reader.take(reader.unpack("Q"))
    start = reader.at
    assert start % 8 == 0
    text = header.decode("ascii")
    table = json.loads(text)
    assert text.rstrip(" ") == canonical(table)
    assert len(text) - len(text.rstrip(" ")) < 8
    assert list(table) == ["__metadata__", "manifest", "payload", "sha256"]
    parts, stop = {}, 0
    for name in ("manifest", "payload", "sha256"):
        begin, (_, stop) = stop, table[name]["data_offsets"]
        assert table[name] == {"data_offsets": [begin, stop], "dtype": "U8", "shape": [stop - begin]}
        parts[name] = data[start + begin : start + stop]
    assert len(data) == start + stop
    assert parts["sha256"] == hashlib.sha256(data[:-32]).digest()
    assert list(table["__metadata__"]) == ["dtrain"]
    provenance = json.loads(table["__metadata__"]["dtrain"])
    assert table["__metadata__"]["dtrain"] == canonical(provenance)
    assert provenance["format"] == 1
    return File(provenance, *parse_manifest(parts["manifest"], Reader(parts["payload"])))


def parse_manifest(manifest, payload):
    reader = Reader(manifest)
    varint, unpack = reader.varint, reader.unpack
    fingerprint = reader.take(32)
    pipelines = []
    for _ in range(varint()):
        stages = []
        for forms in STAGES:
            tag = unpack("B")
            assert tag < len(forms)
            stages.append((tag, *map(unpack, forms[tag])))
        check_pipeline(*stages)
        pipelines.append(stages)
    shared = reader.take(32) if REFERENCE in pipelines else None
    kinds = []
    for _ in range(varint()):
        role, dtype = unpack("B"), DTYPES[unpack("B")]
        shape = tuple(varint() for _ in range(varint()))
        kinds.append((role, dtype, shape, [pipelines[varint()] for _ in range(varint())]))
        check_kind(*kinds[-1])
    names, records = [], {}
    for _ in range(varint()):
        names.append(parse_name(reader, names))
        role, dtype, shape, stages = kinds[varint()]
        digest = b"" if role == WHOLE else reader.take(4)
        payloads = []
        for stage in stages:
            scale, crc = unpack("f"), None if stage == REFERENCE else unpack("I")
            payloads.append(Payload(*stage, scale, b"" if crc is None else payload.take(varint())))
            assert math.isfinite(scale)
            assert crc in (None, zlib.crc32(payloads[-1].data))
        name = names[-1].decode("utf-8")
        records[name] = Record(name, role, dtype, shape, digest, payloads)
    assert all(a < b for a, b in pairwise(names))
    assert reader.at == len(manifest)
    assert payload.at == len(payload.data)
    assert (shared is not None) == any(refers(record) for record in records.values())
    return fingerprint, records, shared


def refers(record):
    return bool(record.payloads) and record.payloads[0].quantise == (8,)


def resolve(file: File, shared: bytes) -> File:
    """Puts the payloads of a shared file where `file` refers to them."""
    assert file.shared == shared[-32:]
    family, records = parse(shared), {}
    assert family.shared is None
    for name, record in file.records.items():
        if refers(record):
            other = family.records[name]
            assert other.role == ADD
            assert other.payloads
            assert (other.shape, other.digest) == (record.shape, record.digest)
            lam = record.payloads[0].scale
            scaled = [payload._replace(scale=single(payload.scale * lam)) for payload in other.payloads]
            assert all(math.isfinite(payload.scale) for payload in scaled)
            record = record._replace(payloads=scaled + record.payloads[1:])
            assert len(record.payloads) <= 255
        records[name] = record
    return file._replace(records=records, shared=None)


def parse_name(reader, names):
    back, prefix, suffix, size = (reader.varint() for _ in range(4))
    middle = reader.take(size)
    if not back:
        return middle
    other = names[-back]
    assert prefix <= len(other)
    assert suffix <= len(other)
    return other[:prefix] + middle + other[len(other) - suffix :]


def check_kind(role, dtype, shape, pipelines):
    assert role <= BASE_ONLY
    if role >= SAME:
        assert not pipelines
    assert role == ADD or REFERENCE not in pipelines
    assert REFERENCE not in pipelines[1:]
    if role in (XOR, WHOLE):
        ((transform, select, quantise, code),) = pipelines
        assert quantise == (4, WIDTHS[dtype]) or role == WHOLE
        assert role == XOR or (transform, select, code) == ((0,), (0,), (0,))
    if role == ADD or (role == WHOLE and quantise[0] != 4):
        assert dtype in EPSILON
        assert all(stages[2][0] != 4 for stages in pipelines)


def to_bytes(value, dtype):
    if dtype == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        return struct.pack("<H", (bits + 0x7FFF + (bits >> 16 & 1)) >> 16)
    try:
        return struct.pack({"float32": "<f", "float16": "<e", "float64": "<d"}[dtype], value)
    except OverflowError:
        return struct.pack("<e", math.copysign(math.inf, value))


def from_bytes(data, dtype):
    if dtype == "bfloat16":
        return struct.unpack("<f", b"\0\0" + data)[0]
    return struct.unpack({"float32": "<f", "float16": "<e", "float64": "<d"}[dtype], data)[0]


def rebuild(record: Record, base: bytes | None) -> bytes | None:
    """The bytes of the fine-tuned tensor from those of the base; None where there is none."""
    numel, width = math.prod(record.shape), WIDTHS[record.dtype]
    if record.role == BASE_ONLY:
        return None
    if record.role in (SAME, DROP):
        return base
    decoded = [(payload.scale, decode(payload, record.name, record.shape)) for payload in record.payloads]
    out = []
    for i in range(numel):
        old = base[width * i : width * (i + 1)] if record.role != WHOLE else bytes(width)
        if is_sum(record):
            rounded = float if record.dtype == "float64" else single
            total = from_bytes(old, record.dtype)
            for scale, found in decoded:
                total = rounded(total + rounded(scale * found[i])) if i in found else total
            out.append(to_bytes(total, record.dtype))
        else:
            out.append((int.from_bytes(old, "little") ^ decoded[0][1][i]).to_bytes(width, "little"))
    return b"".join(out)


def exact(record: Record) -> bool:
    """Whether two readers must agree in every bit: block_dct and low_rank leave the order of a sum open."""
    return all(payload.transform[0] in (0, 3) for payload in record.payloads)


def is_sum(record: Record) -> bool:
    """Whether the tensor is the result of arithmetic, and not a copy of bits."""
    return record.role == ADD or (record.role == WHOLE and record.payloads[0].quantise[0] != 4)


def numbers(record: Record, data: bytes) -> list[bytes]:
    """The values of a tensor, where every NaN is the same one: which of them arithmetic gives is left open."""
    width = WIDTHS[record.dtype]
    values = (data[i : i + width] for i in range(0, len(data), width))
    return [b"NaN" if math.isnan(from_bytes(value, record.dtype)) else value for value in values]


def agrees(record: Record, base: bytes | None, found: bytes | None) -> bool:
    """Whether `found` is the fine-tuned tensor: bit for bit, or to the last place where no more is promised."""
    expected = rebuild(record, base)
    if expected is None or found is None or found == expected:
        return found == expected
    if exact(record):
        return is_sum(record) and numbers(record, expected) == numbers(record, found)
    width, reach = WIDTHS[record.dtype], 0.0
    for payload in record.payloads:
        values = decode(payload, record.name, record.shape).values()
        reach += abs(payload.scale) * max(map(abs, values), default=0.0)  # a sum may cancel: its terms set the place
    for i in range(0, len(expected), width):
        want, have, old = (from_bytes(data[i : i + width], record.dtype) for data in (expected, found, base))
        if abs(want - have) > EPSILON[record.dtype] * (abs(old) + reach) + EPSILON["float32"] * reach:
            return False
    return len(found) == len(expected)


def digest(dtype: str, shape, data: bytes) -> bytes:
    return hashlib.sha256(f"{dtype}{list(shape)}".encode() + data).digest()


def fingerprint(file: File, base: dict) -> bytes:
    """The fingerprint of a base given as name -> bytes; checks the start of every digest on the way."""
    whole = hashlib.sha256()
    for name, record in file.records.items():
        if record.role == WHOLE:
            continue
        found = digest(record.dtype, record.shape, base[name])
        assert found.startswith(record.digest), name
        if record.role != BASE_ONLY:
            whole.update(struct.pack("<I", len(name.encode())) + name.encode() + found)
    return whole.digest()
