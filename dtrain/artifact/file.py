"""The container: a safetensors-readable file of a manifest, payloads and a digest over everything. See FORMAT.md."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, cast

import torch

from dtrain.artifact.atomic import write_atomic
from dtrain.artifact.manifest import pack_manifest, unpack_manifest
from dtrain.artifact.records import Content
from dtrain.errors import ArtifactError
from dtrain.stages.bits import as_buffer

FORMAT_VERSION = 1
_DIGEST = 32
_MAX_HEADER = 1 << 20


def write_file(path: str | Path, content: Content) -> int:
    """Write a delta file atomically and return its bytes.

    Raises:
        InputError: If the path cannot be written.
    """
    return write_atomic(path, pack_file(content))


def pack_file(content: Content) -> list[bytes | memoryview]:
    """Return the bytes of a delta file, in chunks. The same content always gives the same bytes."""
    manifest = pack_manifest(content.records, content.fingerprint, content.shared)
    payloads = [as_buffer(item.data) for record in content.records for item in record.payloads]
    header = _header(content.metadata, len(manifest), sum(map(len, payloads)))
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
        raw = bytearray(Path(path).read_bytes())
    except OSError as error:
        raise ArtifactError(
            path, "cannot be read", f"{error.strerror or error}. Give a file that dtrain wrote."
        ) from error
    return unpack_file(raw, path)


def unpack_file(raw: bytearray, path: object = "delta") -> Content:
    """Check and parse the bytes of a delta file; the payloads are views of `raw`.

    Raises:
        ArtifactError: If anything about them is wrong. `path` is named in the message.
    """
    metadata, start, manifest_size = _read_header(raw, path)
    version = metadata.pop("format", None)
    if version != FORMAT_VERSION:
        raise ArtifactError(
            path,
            "format version",
            f"found {version!r}, this dtrain reads {FORMAT_VERSION}. Upgrade with: pip install -U dtrain",
        )
    view = memoryview(raw)
    if hashlib.sha256(view[:-_DIGEST]).digest() != bytes(view[-_DIGEST:]):
        raise ArtifactError(
            path, "checksum", "the bytes are not those that were written. Copy or download the file again."
        )
    manifest = bytes(view[start : start + manifest_size])
    size = len(raw) - _DIGEST - start - manifest_size
    payload = (
        torch.frombuffer(raw, dtype=torch.uint8, offset=start + manifest_size, count=size)
        if size
        else torch.empty(0, dtype=torch.uint8)
    )
    try:
        records, fingerprint, shared = unpack_manifest(manifest, payload)
        return Content(records, fingerprint, metadata, shared)
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


def _read_header(raw: bytearray, path: object) -> tuple[dict[str, Any], int, int]:
    """Return (metadata, offset of the manifest, bytes of the manifest)."""
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > min(_MAX_HEADER, len(raw) - 8):
        raise ArtifactError(path, "header", f"{len(raw)} bytes are no delta file, or only its start.")
    try:
        header = _parse(bytes(raw[8 : 8 + size]).decode())
        metadata = _parse(header["__metadata__"]["dtrain"])
        manifest, payload = (header[name]["shape"][0] for name in ("manifest", "payload"))
        if not all(type(part) is int and part >= 0 for part in (manifest, payload)):
            raise ValueError("sizes are whole numbers")
        metadata["format"]
        if not isinstance(metadata.get("method", {}), dict):
            raise TypeError("a method is an object")
        if type(metadata.get("nominal_bits", 0)) not in (int, float):
            raise TypeError("bits are a number")
        expected = _header({k: v for k, v in metadata.items() if k != "format"}, manifest, payload)
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise ArtifactError(path, "header", "this is not a delta file of dtrain, or it is damaged.") from error
    known = metadata["format"] == FORMAT_VERSION
    # Everything in the header follows from three things, so it is compared as a whole: nothing can hide in it.
    if known and (expected != bytes(raw[: len(expected)]) or len(expected) != 8 + size):
        raise ArtifactError(path, "header", "the header is not in canonical form. Copy or download the file again.")
    if known and len(raw) != len(expected) + manifest + payload + _DIGEST:
        raise ArtifactError(
            path,
            "size",
            f"{len(raw)} bytes where {len(expected) + manifest + payload + _DIGEST} were written. Copy it again.",
        )
    return metadata, 8 + size, manifest


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
