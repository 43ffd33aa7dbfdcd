"""Inputs of a structure-aware fuzzer: golden files taken apart, bent, and put together with their checksums mended.

An input hangs on the `random.Random` alone: `case(random.Random(7))` is the same file everywhere.
"""

import hashlib
import json
import math
import random
import struct
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tests.artifact import craft, reference_decoder
from tests.artifact.reference_decoder import DTYPES, STAGES, WIDTHS

GOLDEN = Path(__file__).parent / "golden" / "v1"
INTEGERS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 63, 64, 65, 127, 128, 129, 255, 256, 1023, 1024, 1025]
INTEGERS += [2**k + d for k in (15, 16, 24, 31, 32, 40, 47, 48, 53, 62) for d in (-1, 0, 1)] + [2**63 - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 0.5, 0.1, 2.0, 2.0**-24, 2.0**-25, 1 - 2.0**-53, 1e-45, 1e-300, 1e300, 3.4e38, -3.4e38]
FLOATS += [math.nan, math.inf, -math.inf, 65504.0, 2.0**-126]
SCALES = [value for value in FLOATS if abs(value) < 3.5e38 or not math.isfinite(value)]
NAMES = [
    b"",
    b"w",
    b"a/b",
    b"../../x",
    b"/etc/passwd",
    b"\0",
    b"w\0",
    b"\x1b[2J",
    b"[red]",
    b"[/]",
    b"\xff",
    b"x" * 300,
]
NAMES += [
    "größe".encode(),
    b"_orig_mod.w",
    b"a.b",
    b".",
    b"w.weight",
    b"\xed\xa0\x80",
    b"base_model.model.up.lora_A.weight",
]
JSON = [
    "",
    "Dare",
    "[/red]",
    "\x1b[2J",
    "\ud800",
    None,
    True,
    -1,
    0.5,
    1e308,
    10**400,
    [],
    {},
    [[[]]],
    {"name": {}},
    "é" * 50,
]
KEYS = ["method", "nominal_bits", "rules", "fit", "training", "adapter", "requires", "format", "later"]
ADD, XOR, WHOLE, SAME, DROP, BASE_ONLY = range(6)
SMALL = 1 << 12  # bytes: of greater tensors no base is made


@dataclass
class Spec:
    """A delta file, taken apart. A pipeline is four stages, as bytes; a kind is [role, dtype, shape, pipelines]; a
    record is [name, kind, payloads], a payload [scale, bytes]."""

    provenance: dict
    pipelines: list
    kinds: list
    records: list
    family: "Spec | None" = None
    shared: bytes = b""

    def copy(self):
        kinds = [[role, dtype, shape[:], used[:]] for role, dtype, shape, used in self.kinds]
        records = [[name, kind, [item[:] for item in items]] for name, kind, items in self.records]
        family = self.family and self.family.copy()
        return Spec(dict(self.provenance), [p[:] for p in self.pipelines], kinds, records, family, self.shared)


@dataclass
class Flaws:
    """What is not mended when a file is put together."""

    codes: dict = field(default_factory=dict)
    unsorted: bool = False
    digests: bool = False
    crc: bool = False
    sizes: tuple = (0, 0)
    change: object = None
    sha: bool = False


def parse(data):
    """A golden file as a `Spec`, by the reference decoder."""
    file = reference_decoder.parse(data)
    spec = Spec(file.provenance, [], [], [])
    for name, record in file.records.items():
        stages = [[_stage(room, *stage) for room, stage in enumerate(payload[:4])] for payload in record.payloads]
        spec.pipelines += [pipeline for pipeline in stages if pipeline not in spec.pipelines]
        used = [spec.pipelines.index(pipeline) for pipeline in stages]
        kind = [record.role, DTYPES.index(record.dtype), list(record.shape), used]
        spec.kinds += [kind] if kind not in spec.kinds else []
        items = [[payload.scale, payload.data] for payload in record.payloads]
        spec.records.append([name.encode(), spec.kinds.index(kind), items])
    return spec


def _stage(room, tag, *parameters):
    return bytes([tag]) + struct.pack("<" + STAGES[room][tag], *parameters)


def only(spec, names):
    """The spec with these records, and no pipeline or kind that they do not use."""
    out = Spec({"method": spec.provenance.get("method", {})}, [], [], [], spec.family and only(spec.family, names))
    for name, kind, items in spec.records:
        if name in names:
            role, dtype, shape, used = spec.kinds[kind]
            out.pipelines += [spec.pipelines[p] for p in used if spec.pipelines[p] not in out.pipelines]
            new = [role, dtype, shape, [out.pipelines.index(spec.pipelines[p]) for p in used]]
            out.kinds += [new] if new not in out.kinds else []
            out.records.append([name, out.kinds.index(new), items])
    return out


@cache
def seeds():
    """Small specs: for every golden file, one for each sort of record, and a few of several records."""
    found = []
    family = parse((GOLDEN / "family.safetensors").read_bytes())
    for path in sorted(GOLDEN.glob("*.safetensors")):
        spec = parse(path.read_bytes())
        spec.family = family if path.stem == "task_of_family" else None
        sorts = {}
        for name, kind, _ in spec.records:
            role, dtype, shape, used = spec.kinds[kind]
            sort = (role, dtype, min(len(shape), 2), math.prod(shape) > 1, str([spec.pipelines[p] for p in used]))
            sorts.setdefault(sort, name)
        found += [only(spec, {name}) for name in sorts.values()]
        names = [name for name, *_ in spec.records]
        found += [only(spec, set(names[i : i + 4])) for i in range(0, len(names), 9)]
    return list({repr(spec): spec for spec in found}.values())


@cache
def zero_digest(dtype, shape):
    """The SHA-256 of a small tensor of zeros; of a great one, which nobody makes, something else."""
    size = math.prod(shape) * WIDTHS[dtype]
    return reference_decoder.digest(dtype, list(shape), bytes(size)) if size <= SMALL else bytes(32)


def assemble(spec, flaws=None):
    """The bytes of the file; what `flaws` does not name is mended: order, digests, CRC, sizes, SHA-256."""
    flaws = flaws or Flaws()
    records = spec.records if flaws.unsorted else sorted(spec.records, key=lambda record: record[0])
    whole, out, payload = hashlib.sha256(), [], []
    for number, (name, kind, items) in enumerate(records):
        role, dtype, shape, used = spec.kinds[kind] if kind < len(spec.kinds) else (ADD, 0, [], [])
        digest = bytes(32)
        if not flaws.digests and dtype < len(DTYPES):
            digest = zero_digest(DTYPES[dtype], tuple(shape))
        if role not in (WHOLE, BASE_ONLY):
            whole.update(struct.pack("<I", len(name)) + name + digest)
        back, prefix, suffix = flaws.codes.get(number, (0, 0, 0))
        head = b"".join(map(craft.varint, (back, prefix, suffix, len(name)))) + name + craft.varint(kind)
        out.append(head + (b"" if role == WHOLE else digest[:4]))
        for i, (scale, data) in enumerate(items):
            out.append(struct.pack("<f", scale))
            if i < len(used) and used[i] < len(spec.pipelines) and spec.pipelines[used[i]] == REFERENCE:
                continue
            out.append(struct.pack("<I", zlib.crc32(data) ^ flaws.crc) + craft.varint(len(data)))
            payload.append(data)
    kinds = [
        bytes([role, dtype]) + craft.listing([*map(craft.varint, shape)]) + craft.listing([*map(craft.varint, used)])
        for role, dtype, shape, used in spec.kinds
    ]
    table = whole.digest() + craft.listing([b"".join(pipeline) for pipeline in spec.pipelines])
    if REFERENCE in spec.pipelines:
        table += spec.shared or bytes(32)
    table += craft.listing(kinds) + craft.varint(len(records)) + b"".join(out)
    body = b"".join(payload)
    text = json.dumps(
        {**spec.provenance, "format": spec.provenance.get("format", 1)}, sort_keys=True, separators=(",", ":")
    )
    sizes = (len(table) + flaws.sizes[0], len(body) + flaws.sizes[1])
    data = craft.header(*map(abs, sizes), provenance=text) + table + body
    if flaws.change:
        data = flaws.change(data)
    return bytes(craft.seal(data)) if not flaws.sha else data + bytes(32)


REFERENCE = [b"\0", b"\0", b"\x08", b"\0"]


def case(rng, targets=("load", "inspect", "apply")):
    """One input: (target, file, the family's shared file or None)."""
    spec, flaws = rng.choice(seeds()).copy(), Flaws()
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 5))):
        chosen = spec.family if spec.family and rng.random() < 0.2 else spec
        rng.choice(MUTATIONS)(rng, chosen, flaws if chosen is spec else Flaws())
    family = None
    if spec.family:
        family = assemble(spec.family)
        spec.shared = family[-32:] if rng.random() < 0.95 else bytes(32)
    return rng.choice(targets), assemble(spec, flaws), family


def _integer(rng, near=0):
    if rng.random() < 0.5:
        return max(0, near + rng.choice((-2, -1, 1, 2, 8, -8)))
    return rng.choice(INTEGERS)


def _stage_tag(rng, spec, _):
    if spec.pipelines:
        pipeline, room = rng.choice(spec.pipelines), rng.randrange(4)
        tag = rng.randrange(len(STAGES[room]) + (rng.random() < 0.1))
        layout = STAGES[room][tag] if tag < len(STAGES[room]) else ""
        pipeline[room] = bytes([tag]) + b"".join(_field(rng, form) for form in layout)


def _field(rng, form):
    if form == "d":
        value = rng.random() if rng.random() < 0.6 else rng.choice(FLOATS)
        return struct.pack("<d", value)
    limit = {"B": 256, "I": 1 << 32, "Q": 1 << 64}[form]
    value = rng.randrange(18) if rng.random() < 0.6 else rng.choice(INTEGERS)
    return struct.pack("<" + form, value % limit)


def _stage_parameter(rng, spec, _):
    if not spec.pipelines:
        return
    pipeline, room = rng.choice(spec.pipelines), rng.randrange(4)
    tag, old = pipeline[room][0], pipeline[room][1:]
    if not old or tag >= len(STAGES[room]):
        return
    at, layout = 0, STAGES[room][tag]
    chosen = rng.randrange(len(layout))
    for form in layout[:chosen]:
        at += struct.calcsize("<" + form)
    new = _field(rng, layout[chosen])
    pipeline[room] = bytes([tag]) + old[:at] + new + old[at + len(new) :]


def _kind_part(rng, spec, _):
    if spec.kinds:
        kind = rng.choice(spec.kinds)
        part = rng.randrange(3)
        if part == 0:
            kind[0] = rng.choice((ADD, ADD, XOR, WHOLE, WHOLE, SAME, DROP, BASE_ONLY, 6, 255))
        elif part == 1:
            kind[1] = rng.randrange(20)
        elif kind[3] and rng.random() < 0.5:
            kind[3].pop(rng.randrange(len(kind[3])))
        else:
            kind[3].insert(rng.randrange(len(kind[3]) + 1), rng.randrange(len(spec.pipelines) + 1))


def _shape(rng, spec, _):
    if spec.kinds:
        shape = rng.choice(spec.kinds)[2]
        way = rng.random()
        if shape and way < 0.6:
            at = rng.randrange(len(shape))
            shape[at] = _integer(rng, shape[at])
        elif shape and way < 0.8:
            shape.pop(rng.randrange(len(shape)))
        elif way < 0.98:
            shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, 1, 1, 2, 3)))
        else:
            shape[:] = [1] * rng.choice((63, 64, 65))


def _record(rng, spec, flaws):
    if not spec.records:
        return
    record, way = rng.choice(spec.records), rng.randrange(6)
    if way == 0:
        record[0] = rng.choice(NAMES)
    elif way == 1:
        record[1] = rng.randrange(len(spec.kinds) + 1)
    elif way == 2:
        flaws.codes[rng.randrange(len(spec.records))] = tuple(rng.choice((0, 1, 2, 3, 300)) for _ in range(3))
    elif way == 3:
        spec.records.append([rng.choice(NAMES), record[1], [item[:] for item in record[2]]])
    elif way == 4 and rng.random() < 0.5:
        spec.records.remove(record)
    elif record[2] and rng.random() < 0.5:
        record[2].pop()
    else:
        record[2].append([rng.choice(SCALES), rng.randbytes(rng.randrange(9))])


def _scale(rng, spec, _):
    items = [item for _, _, items in spec.records for item in items]
    if items:
        rng.choice(items)[0] = rng.choice(SCALES)


def _payload(rng, spec, _):
    items = [item for _, _, items in spec.records for item in items]
    if not items:
        return
    item = rng.choice(items)
    data, way = bytearray(item[1]), rng.randrange(7)
    at = rng.randrange(len(data) + 1)
    if way == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif way == 1 and at < len(data):
        data[at] = rng.choice((0, 1, 2, 63, 64, 127, 128, 255))
    elif way == 2:
        del data[at : at + rng.choice((1, 1, 2, 4, 1000))]
    elif way == 3:
        data[at:at] = rng.randbytes(rng.choice((1, 1, 2, 4, 30)))
    elif way == 4:
        other = rng.choice(items)[1]
        data[at:] = other[rng.randrange(len(other) + 1) :]
    elif way == 5:
        data[at : at + rng.randrange(3)] = craft.varint(rng.choice(INTEGERS))
    else:
        data = bytearray(rng.randbytes(rng.choice((0, 1, 2, 8, 40))))
    item[1] = bytes(data)


def _provenance(rng, spec, _):
    target = spec.provenance
    if isinstance(target.get("method"), dict) and rng.random() < 0.5:
        target["method"] = target = dict(target["method"])
        target[rng.choice([*target, "name", "host"])] = rng.choice(JSON)
    else:
        target[rng.choice(KEYS)] = rng.choice(JSON)


def _swap(rng, spec, _):
    """Take a part from another file."""
    other = rng.choice(seeds())
    way = rng.randrange(3)
    if way == 0 and spec.pipelines and other.pipelines:
        spec.pipelines[rng.randrange(len(spec.pipelines))] = rng.choice(other.pipelines)[:]
    elif way == 1 and spec.records and other.records:
        rng.choice(spec.records)[2] = [item[:] for item in rng.choice(other.records)[2]]
    elif spec.kinds and other.kinds:
        role, dtype, shape, _ = rng.choice(other.kinds)
        rng.choice(spec.kinds)[:3] = [role, dtype, shape[:]]


def _flaw(rng, _, flaws):
    way = rng.randrange(8)
    if way == 0:
        flaws.unsorted = True
    elif way == 1:
        flaws.digests = True
    elif way == 2:
        flaws.crc = True
    elif way == 3:
        flaws.sha = True
    elif way == 4:
        flaws.sizes = rng.choice(((1, 0), (-1, 1), (1, -1), (0, 1), (-8, 0), (10**6, 0), (0, 2**62)))
    else:
        flaws.change = _raw(rng.random(), rng.randrange(256), rng.choice((0, 1, 1, 1, 2, 9)))


def _raw(place, byte, size):
    """Change of a byte, or of a few, anywhere in the file, before the SHA-256 is taken."""

    def change(data):
        at = int(place * len(data))
        return data[:at] + bytes([byte]) * size + data[at + 1 :]

    return change


MUTATIONS = [
    *[_stage_tag] * 3, *[_stage_parameter] * 3, *[_kind_part] * 3, *[_shape] * 3, *[_record] * 2, *[_scale] * 2,
    *[_payload] * 6, _provenance, *[_swap] * 3, *[_flaw] * 3,
]  # fmt: skip


def seeded(seed, index):
    """The generator of input `index` of the run `seed`."""
    return random.Random(seed << 48 | index)  # noqa: S311 - it is to be repeatable
