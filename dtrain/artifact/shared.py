"""A family's shared file: found by the digest it ends with, its payloads put where a task's file refers to them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from dtrain.artifact.file import file_digest
from dtrain.artifact.records import DIGEST_FILE, MAX_PAYLOADS, Content, Record, Role
from dtrain.errors import ArtifactError, InputError
from dtrain.stages import SHARED

_CHECK = "shared file"
_ADVICE = "Put the family's shared file into the same folder, or give it: dtrain.load(path, shared=...), --shared FILE."


def find_shared(content: Content, path: str | Path) -> Path:
    """Return the file that `content`, read from `path`, refers to: one of the same folder.

    Raises:
        ArtifactError: If no `.safetensors` file there ends with its digest.
    """
    for other in sorted(Path(path).parent.glob("*.safetensors")):
        if _ending(other) == content.shared:
            return other
    found = f"no .safetensors file beside it ends with the SHA-256 {content.shared.hex()} that it refers to"
    raise ArtifactError(path, _CHECK, f"{found}. {_ADVICE}")


def resolve(content: Content, shared: Content | None, origin: object) -> Content:
    """Return `content` with the payloads of the shared file in the place of its references, before all others.

    Args:
        content: What the delta's own file holds. It is returned as it is where it refers to nothing.
        shared: The shared file's.
        origin: The delta's file, for messages.

    Raises:
        ArtifactError: If `shared` is missing, another file, of another base, or has no change for a tensor in question.
    """
    if not content.shared:
        return content
    if shared is None:
        raise ArtifactError(origin, _CHECK, f"it refers to the file of SHA-256 {content.shared.hex()}. {_ADVICE}")
    if (found := file_digest(shared)) != content.shared:
        wanted = f"it refers to the file of SHA-256 {content.shared.hex()}"
        raise ArtifactError(origin, _CHECK, f"{wanted}, and was given that of {found.hex()}. Give the right one.")
    if shared.shared:
        raise ArtifactError(origin, _CHECK, "it refers to a file that itself refers to another. Make it again.")
    family = {record.name: record for record in shared.records}
    records = tuple(_resolved(record, family.get(record.name), origin) for record in content.records)
    return replace(content, records=records, shared=b"")


def _resolved(record: Record, shared: Record | None, origin: object) -> Record:
    if not record.payloads or record.payloads[0].pipeline != SHARED:
        return record
    if shared is None or shared.role is not Role.ADD or not shared.payloads:
        detail = "the shared file holds no change of this tensor. Make the delta again with this shared file."
        raise ArtifactError(origin, _CHECK, detail, record.name)
    if (shared.shape, shared.digest) != (record.shape, record.digest):
        detail = "the shared file was made from another base. Make both from the same one."
        raise ArtifactError(origin, _CHECK, detail, record.name)
    reference, *own = record.payloads
    if len(shared.payloads) + len(own) > MAX_PAYLOADS:
        detail = f"{len(shared.payloads)} shared payloads and {len(own)} of its own are more than {MAX_PAYLOADS}."
        raise ArtifactError(origin, _CHECK, detail, record.name)
    try:
        scaled = [replace(payload, scale=payload.scale * reference.scale) for payload in shared.payloads]
    except InputError as error:
        raise ArtifactError(origin, _CHECK, "a shared scale times its own overflows float32.", record.name) from error
    return replace(record, payloads=(*scaled, *own))


def _ending(path: Path) -> bytes:
    """Return the last bytes of a file, as many as a digest has; nothing where they cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(-DIGEST_FILE, os.SEEK_END)
            return file.read()
    except OSError:  # a folder, a file too short, or one that may not be read
        return b""
