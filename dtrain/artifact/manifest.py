"""The binary tensor table of a delta file. FORMAT.md describes it; this module writes and reads it."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from dtrain.artifact.names import MAX_ALL_NAMES, NameCode, restore, shorten
from dtrain.artifact.records import DIGEST_BYTES, Record, Role
from dtrain.stages import STAGES, All, Bits, Packed, Payload, Pipeline
from dtrain.stages.bits import as_buffer

#: The number of a dtype in a file. Append only.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip

_T = TypeVar("_T")
_MAX_RANK = 64
_PAYLOADS = {Role.ADD: (0, 255), Role.XOR: (1, 1), Role.WHOLE: (1, 1)}

Kind = tuple[Role, torch.dtype, tuple[int, ...], tuple[Pipeline, ...]]


def pack_manifest(records: tuple[Record, ...], fingerprint: bytes) -> bytes:
    """Return the manifest of `records`, which must be sorted by the UTF-8 bytes of their names."""
    pipelines = list(dict.fromkeys(item.pipeline for record in records for item in record.payloads))
    kinds = list(dict.fromkeys(_kind(record) for record in records))
    out = [fingerprint, _varint(len(pipelines)), *map(_pack_pipeline, pipelines), _varint(len(kinds))]
    for role, dtype, shape, used in kinds:
        out += [bytes([role, DTYPES.index(dtype)]), _varint(len(shape)), *map(_varint, shape)]
        out += [_varint(len(used)), *(_varint(pipelines.index(pipeline)) for pipeline in used)]
    out.append(_varint(len(records)))
    kind_index = {kind: index for index, kind in enumerate(kinds)}
    for record, code in zip(records, shorten([record.name.encode() for record in records]), strict=True):
        out += [_varint(code.back), _varint(code.prefix), _varint(code.suffix), _varint(len(code.middle)), code.middle]
        out += [_varint(kind_index[_kind(record)]), record.digest]
        for item in record.payloads:
            out += [struct.pack("<fI", item.scale, checksum(item.data)), _varint(item.data.numel())]
    return b"".join(out)


def unpack_manifest(manifest: bytes, payload: Tensor) -> tuple[tuple[Record, ...], bytes]:
    """Return (records, fingerprint); the records' data are views of `payload`.

    Raises:
        ValueError: If anything in it is out of range, out of order, or inconsistent with `payload`. The message may
            start with a tensor's name, divided by a NUL.
    """
    cursor = _Cursor(manifest)
    fingerprint = cursor.take(32)
    pipelines = cursor.sequence(lambda: _read_pipeline(cursor))
    kinds = cursor.sequence(lambda: _read_kind(cursor, pipelines))
    names: list[bytes] = []
    offset = name_bytes = 0

    def read_record() -> Record:
        """Read one record and take its payloads from where the one before ended."""
        nonlocal offset, name_bytes
        name = restore(NameCode(cursor.varint(), cursor.varint(), cursor.varint(), cursor.take(cursor.varint())), names)
        if names and name <= names[-1]:
            raise ValueError("the tensor names are not in ascending order")
        names.append(name)
        name_bytes += len(name)
        if name_bytes > MAX_ALL_NAMES:
            raise ValueError(f"the tensor names take more than {MAX_ALL_NAMES} bytes")
        role, dtype, shape, used = cursor.choose(kinds)
        digest = b"" if role is Role.WHOLE else cursor.take(DIGEST_BYTES)
        items: list[Payload] = []
        for pipeline in used:
            scale, crc = cast("tuple[float, int]", cursor.unpack("<fI"))
            size = cursor.varint()
            if not math.isfinite(scale):
                raise ValueError(f"{name.decode()}\0the scale is {scale}")
            if size > payload.numel() - offset:
                raise ValueError(f"{name.decode()}\0the payload ends after {payload.numel() - offset} of {size} bytes")
            data = payload[offset : offset + size]
            if checksum(data) != crc:
                raise ValueError(f"{name.decode()}\0the payload's checksum does not match its bytes")
            items.append(Payload(pipeline, data, scale))
            offset += size
        return Record(name.decode(), role, dtype, shape, digest, tuple(items))

    records = cursor.sequence(read_record)
    if cursor.left or offset != payload.numel():
        raise ValueError(f"{cursor.left} bytes of manifest and {payload.numel() - offset} of payload are left over")
    return tuple(records), fingerprint


def checksum(data: Tensor) -> int:
    """Return the CRC-32 of a payload."""
    return zlib.crc32(as_buffer(data))


def _kind(record: Record) -> Kind:
    return record.role, record.dtype, record.shape, tuple(item.pipeline for item in record.payloads)


def _pack_pipeline(pipeline: Pipeline) -> bytes:
    stages = (pipeline.select, pipeline.quantise, pipeline.code)
    return b"".join(bytes([stage.tag]) + struct.pack("<" + stage.layout, *astuple(stage)) for stage in stages)


def _read_pipeline(cursor: _Cursor) -> Pipeline:
    stages: list[Any] = []
    for room, choices in zip(("select", "quantise", "code"), STAGES, strict=True):
        tag = cursor.take(1)[0]
        found = [stage for stage in choices if stage.tag == tag]
        if not found:
            raise ValueError(f"{room} stage {tag} is unknown: the file needs a newer dtrain")
        stages.append(found[0](*cursor.unpack("<" + found[0].layout)))  # the stage checks its own parameters
    return Pipeline(*stages)


def _read_kind(cursor: _Cursor, pipelines: list[Pipeline]) -> Kind:
    role_number, dtype_number = cursor.take(2)
    if role_number not in list(Role) or dtype_number >= len(DTYPES):
        raise ValueError(f"role {role_number} or dtype {dtype_number} is unknown: the file needs a newer dtrain")
    role, dtype = Role(role_number), DTYPES[dtype_number]
    shape = tuple(cursor.sequence(cursor.varint, limit=_MAX_RANK))
    if math.prod(max(size, 1) for size in shape) >= 1 << 48:
        raise ValueError(f"a tensor of shape {shape} is larger than any model")
    used = tuple(cursor.sequence(lambda: cursor.choose(pipelines)))
    least, most = _PAYLOADS.get(role, (0, 0))
    if not least <= len(used) <= most:
        raise ValueError(f"a tensor of role {role.name} has {len(used)} payloads")
    if role is Role.ADD and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"a change cannot be added to values of {dtype}")
    bitwise = [isinstance(pipeline.quantise, Bits) for pipeline in used]
    if bitwise and not all(bit == (role is not Role.ADD) for bit in bitwise):
        raise ValueError(f"a tensor of role {role.name} has payloads of the wrong sort")
    for pipeline in used:
        if isinstance(pipeline.quantise, Bits) and pipeline.quantise.width != dtype.itemsize:
            raise ValueError(f"values of {pipeline.quantise.width} bytes cannot be {dtype}")
        if role is not Role.ADD and not isinstance(pipeline.select, All):
            raise ValueError(f"a tensor of role {role.name} must have a value everywhere")
        if role is Role.WHOLE and not isinstance(pipeline.code, Packed):
            raise ValueError(
                "a whole tensor must be stored byte for byte"
            )  # nothing bounds what a coder could expand to
    return role, dtype, shape, used


def _varint(value: int) -> bytes:
    """Return unsigned LEB128: seven bits a byte, least significant first, the top bit says that more follow."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Cursor:
    """Reads forward through bytes and never past their end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        """Read `size` bytes."""
        if size > self.left:
            raise ValueError(f"the manifest ends after {self.left} of {size} bytes")
        self._at += size
        return self._data[self._at - size : self._at]

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Read the fields of a `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def varint(self) -> int:
        """Read one number in its shortest spelling."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise ValueError("a number is written in more bytes than it needs")  # one number, one spelling
                return value
        raise ValueError("a number is longer than 63 bits")

    def sequence(self, read: Callable[[], _T], limit: int | None = None) -> list[_T]:
        """Read a count and as many items."""
        count = self.varint()
        if count > min(self.left, limit or count):  # every item takes a byte at least: no allocation beyond the file
            raise ValueError(f"a list of {count} items does not fit the {self.left} bytes left")
        return [read() for _ in range(count)]

    def choose(self, options: list[_T]) -> _T:
        """Read a number that points into `options`."""
        index = self.varint()
        if index >= len(options):
            raise ValueError(f"item {index} of a list of {len(options)} is referred to")
        return options[index]
