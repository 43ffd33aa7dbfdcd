"""A second, slow reader of delta files, written from `dtrain/artifact/FORMAT.md` alone.

Standard library and zstandard only: no torch, no numpy, nothing of dtrain. Every check is an `assert`.
"""

import bisect
import hashlib
import json
import math
import struct
import zlib
from collections import namedtuple
from itertools import accumulate, count, pairwise, repeat, takewhile

import zstandard

ADD, XOR, WHOLE, SAME, DROP, BASE_ONLY = range(6)
WIDTHS = {  # bytes per value, in the order of the dtypes' numbers
    "float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4,
    "int64": 8, "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16, "float8_e4m3fn": 1,
    "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
}  # fmt: skip
DTYPES = list(WIDTHS)
MASK = 0xFFFFFFFF


# A stage is its tag and its parameters: (1, 0.25, 7) is bernoulli with keep 0.25 and seed 7.
Payload = namedtuple("Payload", "select quantise code scale data")
Record = namedtuple("Record", "name role dtype shape digest payloads")
File = namedtuple("File", "provenance fingerprint records")


class Reader:
    """Takes bytes from the front, never past the end."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        assert self.at + size <= len(self.data), "ends early"
        self.at += size
        return self.data[self.at - size : self.at]

    def unpack(self, form):
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def varint(self):
        value = 0
        for shift in range(0, 64, 7):
            byte = self.unpack("B")
            value |= (byte & 127) << shift
            if byte < 128:
                assert byte or not shift, "overlong varint"
                return value
        raise AssertionError("varint of more than 64 bits")


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
    selects, quantises, codes = ("", "dQ", "dQ"), ("", "", "", "B", "B"), ("", "")
    pipelines = []
    for _ in range(varint()):
        stages = []
        for forms in (selects, quantises, codes):
            tag = unpack("B")
            assert tag < len(forms)
            stages.append((tag, *map(unpack, forms[tag])))
        pipelines.append(stages)
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
        digest = b"" if role == WHOLE else reader.take(8)
        payloads = []
        for stage in stages:
            scale, crc = unpack("f"), unpack("I")
            payloads.append(Payload(*stage, scale, payload.take(varint())))
            assert math.isfinite(scale)
            assert crc == zlib.crc32(payloads[-1].data)
        name = names[-1].decode("utf-8")
        records[name] = Record(name, role, dtype, shape, digest, payloads)
    assert all(a < b for a, b in pairwise(names))
    assert reader.at == len(manifest)
    assert payload.at == len(payload.data)
    return fingerprint, records


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
    if role in (XOR, WHOLE):
        ((select, quantise, code),) = pipelines
        assert quantise == (4, WIDTHS[dtype])
        assert role == XOR or (select == (0,) and code == (0,))


def philox(counter, key):
    """Philox4x32-10 (Salmon et al., SC 2011): four counter words and two key words give four words."""
    a, b, c, d = counter
    k, m = key
    for _ in range(10):
        high, low = divmod(0xD2511F53 * a, 1 << 32)
        top, end = divmod(0xCD9E8D57 * c, 1 << 32)
        a, b, c, d = top ^ b ^ k, end, high ^ d ^ m, low
        k, m = k + 0x9E3779B9 & MASK, m + 0xBB67AE85 & MASK
    return a, b, c, d


def words(seed, name, first=0):
    """w(first), w(first + 1), ..."""
    key = struct.unpack("<II", hashlib.sha256(struct.pack("<Q", seed) + name.encode()).digest()[:8])
    for block in count(first // 4):
        out = philox((block & MASK, block >> 32, 0, 0), key)
        yield from out[max(0, first - 4 * block) :]


def positions(select, name, numel):
    """The ascending positions that have values."""
    tag, *parameters = select
    if tag == 0:
        return range(numel)
    keep, seed = parameters
    assert 0 < keep < 1
    return list((bernoulli if tag == 1 else stratified)(keep, words(seed, name), numel))


def bernoulli(keep, word, numel):
    one = 1 << 128
    miss = one - math.floor(math.ldexp(keep, 80)) * (1 << 48)
    power = list(accumulate(repeat(miss, 1024), lambda p, m: p * m >> 128, initial=one))
    cut = power[1024]
    low = [-(((p - cut) << 32) // (one - cut)) for p in power[1:1024]]
    tail = accumulate(repeat(cut), lambda t, c: t * c >> 128)
    high = [-h for h in takewhile(lambda h: h > 0, (t >> 96 for t in tail))]
    position = -1
    while True:  # both tables are ascending after the change of sign: bisect counts the entries below -w
        fine, coarse = next(word), next(word)
        position += 1 + 1024 * bisect.bisect_left(high, -coarse) + bisect.bisect_left(low, -fine)
        if position >= numel:
            return
        yield position


def stratified(keep, word, numel):
    rate = min(keep, 1 - keep)
    stride = round(4096 / rate)
    starts = takewhile(lambda start: start < 4096 * numel, count(0, stride))
    draws = {(start + (w * stride >> 32)) >> 12 for start, w in zip(starts, word, strict=False)}
    return sorted(set(range(numel)) - draws if keep > 0.5 else {draw for draw in draws if draw < numel})


def values(payload: Payload, size: int) -> list:
    """The values of `size` positions; whole numbers for `bits`."""
    (tag, *parameters), data = payload.quantise, payload.data
    bits = (16, 16, 1, parameters[0] if tag == 3 else None, 8 * parameters[0] if tag == 4 else None)[tag]
    expected = (bits * size + 7) // 8
    if payload.code == (1,):
        assert zstandard.get_frame_parameters(data, zstandard.FORMAT_ZSTD1).content_size == expected
        stream = zstandard.ZstdDecompressor().decompressobj()
        data = stream.decompress(data)
        assert stream.eof
        assert not stream.unused_data
    assert len(data) == expected
    if tag == 0:
        return list(struct.unpack(f"<{size}e", data))
    if tag == 1:
        return [struct.unpack("<f", b"\0\0" + data[2 * i : 2 * i + 2])[0] for i in range(size)]
    if tag == 4:
        return [int.from_bytes(data[i::size], "little") for i in range(size)]
    whole = int.from_bytes(data, "little")
    assert whole >> bits * size == 0
    codes = [whole >> bits * i & (1 << bits) - 1 for i in range(size)]
    return [2 * code - 1 for code in codes] if tag == 2 else [code - (2 ** (bits - 1) - 1) for code in codes]


def single(value):
    """Rounds to float32."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


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
    decoded = []
    for payload in record.payloads:
        where = positions(payload.select, record.name, numel)
        decoded.append((payload.scale, dict(zip(where, values(payload, len(where)), strict=True))))
    out = []
    for i in range(numel):
        old = base[width * i : width * (i + 1)] if record.role != WHOLE else bytes(width)
        if record.role == ADD:
            rounded = float if record.dtype == "float64" else single
            total = from_bytes(old, record.dtype)
            for scale, found in decoded:
                total = rounded(total + rounded(scale * found.get(i, 0)))
            out.append(to_bytes(total, record.dtype))
        else:
            out.append((int.from_bytes(old, "little") ^ decoded[0][1].get(i, 0)).to_bytes(width, "little"))
    return b"".join(out)


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
