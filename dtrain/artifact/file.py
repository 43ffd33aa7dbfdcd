"""The container: a safetensors-readable file of a manifest, payloads and a digest over everything. See FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO, NamedTuple, cast

import torch

from dtrain.artifact.atomic import write_atomic
from dtrain.artifact.manifest import NewerError, find_damage, pack_manifest, unpack_manifest
from dtrain.artifact.records import Content
from dtrain.errors import ArtifactError, InputError
from dtrain.stages.bits import as_buffer

FORMAT_VERSION = 1
_DIGEST = 32
_MAX_HEADER = 1 << 20
_MAX_DEPTH = 32  # of provenance: what is parsed near the top of the stack must not fail when it is printed deeper down
_MAX_BITS = 1 << 32  # of a weight, by a paper's accounting
_PIECE = 1 << 20
_PACKAGE = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}")  # a version of dtrain, and nothing else: it goes into a command


class _Header(NamedTuple):
    """What the first bytes of a file say: provenance, and where manifest, payload and the file itself end."""

    metadata: dict[str, Any]
    start: int
    manifest: int
    total: int


def write_file(path: str | Path, content: Content) -> int:
    """Write a delta file atomically and return its bytes.

    Raises:
        InputError: If the path cannot be written.
    """
    return write_atomic(path, pack_file(content))


def pack_file(content: Content) -> list[bytes | memoryview]:
    """Return the bytes of a delta file, in chunks. The same content always gives the same bytes.

    Raises:
        InputError: If there is more of something than a file may have.
    """
    manifest = pack_manifest(content.records, content.fingerprint, content.shared)
    payloads = [as_buffer(item.data) for record in content.records for item in record.payloads]
    header = _header(content.metadata, len(manifest), sum(map(len, payloads)))
    if len(header) > _MAX_HEADER or _deeper(content.metadata, _MAX_DEPTH):
        raise InputError(
            f"the metadata of a delta take {len(header)} bytes, where {_MAX_HEADER} are the most, or are nested more "
            f"than {_MAX_DEPTH} deep. Say less about the training or the adapter."
        )
    chunks: list[bytes | memoryview] = [header, manifest, *payloads]
    sha = hashlib.sha256()
    for chunk in chunks:
        sha.update(chunk)
    return [*chunks, sha.digest()]


def file_digest(content: Content) -> bytes:
    """Return the SHA-256 that ends the file of `content`: what another file calls it by."""
    return bytes(pack_file(content)[-1])


def read_file(path: str | Path) -> Content:
    """Read and check a delta file.

    Raises:
        ArtifactError: If the file is missing, damaged, malformed or of a newer format.
    """
    try:
        with Path(path).open("rb") as file:
            raw = bytearray(file.read(8 + _MAX_HEADER))
            header = _read_header(raw, path)  # a model given by mistake is refused before it takes memory
            digest = _read_rest(file, raw, header.total)
    except OSError as error:
        raise ArtifactError(
            path, "cannot be read", f"{error.strerror or error}. Give a file that dtrain wrote."
        ) from error
    return _unpack(raw, header, digest, path)


def unpack_file(raw: bytearray, path: object = "delta") -> Content:
    """Check and parse the bytes of a delta file; the payloads are views of `raw`.

    Raises:
        ArtifactError: If anything about them is wrong. `path` is named in the message.
    """
    header = _read_header(raw, path)
    return _unpack(raw, header, hashlib.sha256(memoryview(raw)[:-_DIGEST]).digest(), path)


def _read_rest(file: BinaryIO, raw: bytearray, total: int) -> bytes:
    """Read on to the end of a file of `total` bytes, and return the SHA-256 of all but those that should be it.

    A thread hashes each piece while the next one is read, and no more than that is held twice.
    """
    end = total - _DIGEST
    sha, thread = hashlib.sha256(raw[:end]), None
    while len(raw) < end and (more := file.read(min(_PIECE, end - len(raw)))):
        raw += more
        if thread:
            thread.join()
        thread = _start(sha.update, more)
    if thread:
        thread.join()
    raw += file.read(_DIGEST + 1)  # one byte more than there should be, if there is one
    return sha.digest()


def _start(work: Callable[[bytes], None], piece: bytes) -> Thread | None:
    """Begin the work in a thread. Where there can be none, at exit or under a limit, it is done before returning."""
    thread = Thread(target=work, args=(piece,))
    try:
        thread.start()
    except RuntimeError:
        work(piece)
        return None
    return thread


def _unpack(raw: bytearray, header: _Header, digest: bytes, path: object) -> Content:
    metadata, start, manifest_size, total = header
    if len(raw) != total:
        raise ArtifactError(path, "size", f"{len(raw)} bytes where {total} were written. Copy or download it again.")
    view = memoryview(raw)
    manifest = bytes(view[start : start + manifest_size])
    size = len(raw) - _DIGEST - start - manifest_size
    payload = (
        torch.frombuffer(raw, dtype=torch.uint8, offset=start + manifest_size, count=size)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )
    if digest != bytes(view[-_DIGEST:]):
        detail = "the bytes are not those that were written. Copy or download the file again."
        raise ArtifactError(path, "checksum", detail, find_damage(manifest, payload))
    try:
        records, fingerprint, shared = unpack_manifest(manifest, payload)
        return Content(records, fingerprint, metadata, shared)
    except NewerError as error:
        raise ArtifactError(path, "format version", f"{error}. {_upgrade(metadata)}") from error
    except ValueError as error:
        tensor, _, detail = str(error).rpartition("\0")
        raise ArtifactError(
            path, "manifest", f"{detail.rstrip('.')}. Copy or download the file again.", tensor or None
        ) from error


def _header(metadata: dict[str, Any], manifest: int, payload: int) -> bytes:
    ends = [0, manifest, manifest + payload, manifest + payload + _DIGEST]
    entry = {
        name: {"dtype": "U8", "shape": [stop - start], "data_offsets": [start, stop]}
        for name, start, stop in zip(("manifest", "payload", "sha256"), ends, ends[1:], strict=False)
    }
    # One key: safetensors writers order several keys at random; canonical JSON under one key is the same everywhere.
    provenance = _canonical({"format": FORMAT_VERSION, **metadata})
    header = _canonical({"__metadata__": {"dtrain": provenance}, **entry}).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _read_header(raw: bytearray, path: object) -> _Header:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(_MAX_HEADER, len(raw) - 8):
        raise ArtifactError(path, "header", "this is no delta file of dtrain, or only the start of one.")
    try:
        table = _parse(bytes(raw[8 : 8 + size]).decode())
        metadata = _parse(table["__metadata__"]["dtrain"])
        version = metadata.pop("format")
        found = repr(version)[:40]
        sizes = _sizes(table, metadata) if version == FORMAT_VERSION else None
        expected = _header(metadata, *sizes) if sizes else b""
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ArtifactError(path, "header", "this is not a delta file of dtrain, or it is damaged.") from error
    if sizes is None:
        detail = f"found {found}, this dtrain reads {FORMAT_VERSION}. {_upgrade(metadata)}"
        raise ArtifactError(path, "format version", detail)
    # Everything in the header follows from three things, so it is compared as a whole: nothing can hide in it.
    if expected != bytes(raw[: len(expected)]) or len(expected) != 8 + size:
        raise ArtifactError(path, "header", "the header is not in canonical form. Copy or download the file again.")
    return _Header(metadata, len(expected), sizes[0], len(expected) + sum(sizes) + _DIGEST)


def _sizes(table: dict[str, Any], metadata: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of manifest and payload. Refuses provenance that could not be printed or counted with."""
    if not isinstance(metadata.get("method", {}), dict):
        raise TypeError("a method is an object")
    bits = metadata.get("nominal_bits", 0)
    if type(bits) not in (int, float) or not abs(bits) <= _MAX_BITS:
        raise TypeError("bits are a number")
    if _deeper(metadata, _MAX_DEPTH):
        raise ValueError("provenance is nested too deep")
    json.dumps(metadata, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    manifest, payload = (table[name]["shape"][0] for name in ("manifest", "payload"))
    if not all(type(part) is int and part >= 0 for part in (manifest, payload)):
        raise ValueError("sizes are whole numbers")
    return manifest, payload


def _deeper(value: object, depth: int) -> bool:
    """Return whether objects and lists are nested more than `depth` deep."""
    if isinstance(value, dict):
        value = list(cast("dict[str, object]", value).values())
    if not isinstance(value, (list, tuple)):
        return False
    return depth == 0 or any(_deeper(item, depth - 1) for item in cast("list[object]", value))


def _upgrade(metadata: dict[str, Any]) -> str:
    """Return what to do about a file of a later dtrain. It says itself which one, but a file may say anything."""
    needed = metadata.get("requires")
    if isinstance(needed, str) and _PACKAGE.fullmatch(needed):
        return f"The file needs dtrain {needed} or newer: pip install -U 'dtrain>={needed}'"
    return "The file needs a newer dtrain: pip install -U dtrain"


def _parse(text: object) -> dict[str, Any]:
    if not isinstance(text, str):
        raise TypeError("JSON text expected")
    value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    if not isinstance(value, dict):
        raise TypeError("a JSON object expected")
    return cast("dict[str, Any]", value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
