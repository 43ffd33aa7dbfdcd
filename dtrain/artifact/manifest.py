"""The binary tensor table of a delta file. FORMAT.md describes it; this module writes and reads it."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import astuple
from typing import Any, cast

import torch
from torch import Tensor

from dtrain.artifact.names import MAX_ALL_NAMES, NameCode, restore, shorten
from dtrain.artifact.records import DIGEST_BYTES, DIGEST_FILE, MAX_PAYLOADS, Record, Role
from dtrain.errors import InputError
from dtrain.stages import SHARED, STAGES, All, Bits, Packed, Payload, Pipeline, Plain, Shared, check_size
from dtrain.stages.bits import as_buffer
from dtrain.stages.cursor import Cursor, varint

#: The number of a dtype in a file. Append only.
DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float16, torch.bfloat16, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
)  # fmt: skip

_MAX_RANK = 64
#: An entry of a few bytes becomes an object of a thousand: with no bound, 20 MB of file would take 2 GB of memory.
_MAX_PIPELINES, _MAX_RECORDS, _MAX_ALL_PAYLOADS = 1 << 16, 1 << 18, 1 << 20
_PAYLOADS = {Role.ADD: (0, MAX_PAYLOADS), Role.XOR: (1, 1), Role.WHOLE: (1, 1)}

Kind = tuple[Role, torch.dtype, tuple[int, ...], tuple[Pipeline, ...]]


class NewerError(ValueError):
    """A file says something that this version of dtrain has no word for."""


def pack_manifest(records: tuple[Record, ...], fingerprint: bytes, shared: bytes = b"") -> bytes:
    """Return the manifest of `records`, which must be sorted by the UTF-8 bytes of their names.

    Raises:
        InputError: If there are more tensors or payloads than a file may have.
    """
    pipelines = list(dict.fromkeys(item.pipeline for record in records for item in record.payloads))
    counts = (len(pipelines), len(records), sum(len(record.payloads) for record in records))
    limits = (_MAX_PIPELINES, _MAX_RECORDS, _MAX_ALL_PAYLOADS)
    if any(count > limit for count, limit in zip(counts, limits, strict=True)):
        raise InputError(f"{counts} pipelines, tensors and payloads are more than {limits}. Split the model in two.")
    kinds = list(dict.fromkeys(_kind(record) for record in records))
    out = [fingerprint, varint(len(pipelines)), *map(_pack_pipeline, pipelines), shared, varint(len(kinds))]
    for role, dtype, shape, used in kinds:
        out += [bytes([role, DTYPES.index(dtype)]), varint(len(shape)), *map(varint, shape)]
        out += [varint(len(used)), *(varint(pipelines.index(pipeline)) for pipeline in used)]
    out.append(varint(len(records)))
    kind_index = {kind: index for index, kind in enumerate(kinds)}
    for record, code in zip(records, shorten([record.name.encode() for record in records]), strict=True):
        out += [varint(code.back), varint(code.prefix), varint(code.suffix), varint(len(code.middle)), code.middle]
        out += [varint(kind_index[_kind(record)]), record.digest]
        for item in record.payloads:
            out.append(struct.pack("<f", item.scale))
            if item.pipeline != SHARED:
                out += [struct.pack("<I", checksum(item.data)), varint(item.data.numel())]
    return b"".join(out)


def find_damage(manifest: bytes, payload: Tensor) -> str | None:
    """Return the tensor whose payload is not what was written, of a file that is known to be damaged somewhere."""
    try:
        unpack_manifest(manifest, payload, check_payloads=True)
    except ValueError as error:
        return str(error).rpartition("\0")[0] or None
    return None


def unpack_manifest(
    manifest: bytes, payload: Tensor, *, check_payloads: bool = False
) -> tuple[tuple[Record, ...], bytes, bytes]:
    """Return (records, fingerprint, digest of the shared file or nothing); the records' data are views of `payload`.

    Args:
        manifest: Its bytes.
        payload: Those of all payloads.
        check_payloads: Whether their CRC-32 are compared. The SHA-256 of the file says all that they can, but where.

    Raises:
        ValueError: If anything in it is out of range, out of order, or inconsistent with `payload`. The message may
            start with a tensor's name, divided by a NUL.
    """
    cursor = Cursor(manifest, "manifest")
    fingerprint = cursor.take(32)
    pipelines = cursor.sequence(lambda: _read_pipeline(cursor), _MAX_PIPELINES)
    shared = cursor.take(DIGEST_FILE) if SHARED in pipelines else b""
    kinds = cursor.sequence(lambda: _read_kind(cursor, pipelines))
    names: list[bytes] = []
    offset = name_bytes = payloads = 0

    def read_record() -> Record:
        """Read one record and take its payloads from where the one before ended."""
        nonlocal offset, name_bytes, payloads
        name = restore(NameCode(cursor.varint(), cursor.varint(), cursor.varint(), cursor.take(cursor.varint())), names)
        if names and name <= names[-1]:
            raise ValueError("the tensor names are not in ascending order")
        names.append(name)
        name_bytes += len(name)
        if name_bytes > MAX_ALL_NAMES:
            raise ValueError(f"the tensor names take more than {MAX_ALL_NAMES} bytes")
        role, dtype, shape, used = cursor.choose(kinds)
        payloads += len(used)
        if payloads > _MAX_ALL_PAYLOADS:
            raise ValueError(f"the file has more than {_MAX_ALL_PAYLOADS} payloads")
        digest = b"" if role is Role.WHOLE else cursor.take(DIGEST_BYTES)
        items: list[Payload] = []
        for pipeline in used:
            scale = _read_scale(cursor, pipeline, name)
            if pipeline == SHARED:
                items.append(Payload(pipeline, payload[:0], scale))
                continue
            (crc,), size = cast("tuple[int]", cursor.unpack("<I")), cursor.varint()
            if size > payload.numel() - offset:
                raise ValueError(f"{name.decode()}\0the payload ends after {payload.numel() - offset} of {size} bytes")
            data = payload[offset : offset + size]
            if check_payloads and checksum(data) != crc:
                raise ValueError(f"{name.decode()}\0the payload's checksum does not match its bytes")
            items.append(Payload(pipeline, data, scale))
            _check_size(items[-1], shape, name)
            offset += size
        return Record(name.decode(), role, dtype, shape, digest, tuple(items))

    records = cursor.sequence(read_record, _MAX_RECORDS)
    if cursor.left or offset != payload.numel():
        raise ValueError(f"{cursor.left} bytes of manifest and {payload.numel() - offset} of payload are left over")
    return tuple(records), fingerprint, shared


def _read_scale(cursor: Cursor, pipeline: Pipeline, name: bytes) -> float:
    (scale,) = cast("tuple[float]", cursor.unpack("<f"))
    if not math.isfinite(scale) or (scale != 1 and isinstance(pipeline.quantise, Bits)):
        raise ValueError(f"{name.decode()}\0the scale is {scale}")
    return scale


def _check_size(item: Payload, shape: tuple[int, ...], name: bytes) -> None:
    try:
        check_size(item, shape)
    except ValueError as error:
        raise ValueError(f"{name.decode()}\0{error}") from error


def checksum(data: Tensor) -> int:
    """Return the CRC-32 of a payload."""
    return zlib.crc32(as_buffer(data))


def _fixed(pipeline: Pipeline) -> bool:
    """Return whether every value takes as many bits: else nothing would bound what a few bytes expand to."""
    plain = isinstance(pipeline.select, All) and type(pipeline.transform) is Plain
    return plain and isinstance(pipeline.code, Packed) and not isinstance(pipeline.quantise, Shared)


def _kind(record: Record) -> Kind:
    return record.role, record.dtype, record.shape, tuple(item.pipeline for item in record.payloads)


def _pack_pipeline(pipeline: Pipeline) -> bytes:
    stages = (pipeline.transform, pipeline.select, pipeline.quantise, pipeline.code)
    return b"".join(bytes([stage.tag]) + struct.pack("<" + stage.layout, *astuple(stage)) for stage in stages)


def _read_pipeline(cursor: Cursor) -> Pipeline:
    stages: list[Any] = []
    for room, choices in zip(("transform", "select", "quantise", "code"), STAGES, strict=True):
        tag = cursor.take(1)[0]
        found = [stage for stage in choices if stage.tag == tag]
        if not found:
            raise NewerError(f"{room} stage {tag} is unknown")
        stages.append(found[0](*cursor.unpack("<" + found[0].layout)))  # the stage checks its own parameters
    transform, select, quantise, code = stages
    return Pipeline(select, quantise, code, transform)


def _read_kind(cursor: Cursor, pipelines: list[Pipeline]) -> Kind:
    role_number, dtype_number = cursor.take(2)
    if role_number not in list(Role) or dtype_number >= len(DTYPES):
        raise NewerError(f"role {role_number} or dtype {dtype_number} is unknown")
    role, dtype = Role(role_number), DTYPES[dtype_number]
    shape = tuple(cursor.sequence(cursor.varint, limit=_MAX_RANK))
    if math.prod(max(size, 1) for size in shape) >= 1 << 48:
        raise ValueError(f"a tensor of shape {shape} is larger than any model")
    used = tuple(cursor.sequence(lambda: cursor.choose(pipelines)))
    least, most = _PAYLOADS.get(role, (0, 0))
    if not least <= len(used) <= most:
        raise ValueError(f"a tensor of role {role.name} has {len(used)} payloads")
    bitwise = [isinstance(pipeline.quantise, Bits) for pipeline in used]
    added = role is Role.ADD or (role is Role.WHOLE and not any(bitwise))
    if added and not (dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"a change cannot be added to values of {dtype}")
    if (role is Role.ADD and any(bitwise)) or (role is Role.XOR and not all(bitwise)):
        raise ValueError(f"a tensor of role {role.name} has payloads of the wrong sort")
    for pipeline in used:
        if isinstance(pipeline.quantise, Bits) and pipeline.quantise.width != dtype.itemsize:
            raise ValueError(f"values of {pipeline.quantise.width} bytes cannot be {dtype}")
        if role is Role.WHOLE and not _fixed(pipeline):
            raise ValueError("a tensor that is stored whole must hold every value in a fixed number of bits")
        pipeline.transform.grid(shape)  # refuses a rank that the shape does not have
    return role, dtype, shape, used
