"""A family's shared file: found by the digest it ends with, its payloads put where a task's file refers to them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from dtrain.artifact.file import file_digest
from dtrain.artifact.records import DIGEST_FILE, MAX_PAYLOADS, Content, Record, Role
from dtrain.errors import ArtifactError, InputError
from dtrain.stages import SHARED, Payload

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
    users = [record for record in content.records if record.payloads and record.payloads[0].pipeline == SHARED]
    family = shared_payloads(users, shared, origin)
    resolved = {record.name: _resolved(record, family.get(record.name), origin) for record in users}
    return replace(content, records=tuple(resolved.get(r.name, r) for r in content.records), shared=b"")


def shared_payloads(records: Iterable[Record], shared: Content, origin: object) -> dict[str, tuple[Payload, ...]]:
    """Return the payloads that a shared file has for `records`, by name, where it changes a tensor.

    Raises:
        ArtifactError: If it was made from another base, or itself refers to another file. `origin` is named.
    """
    if shared.shared:
        detail = "the shared file itself refers to another. Use one that dtrain.shared_base made."
        raise ArtifactError(origin, _CHECK, detail)
    family = {record.name: record for record in shared.records if record.role is Role.ADD and record.payloads}
    found: dict[str, tuple[Payload, ...]] = {}
    for record in records:
        if (other := family.get(record.name)) is None:
            continue
        if (other.shape, other.digest) != (record.shape, record.digest):
            detail = "the shared file was made from another base. Make both from the same one."
            raise ArtifactError(origin, _CHECK, detail, record.name)
        found[record.name] = other.payloads
    return found


def _resolved(record: Record, shared: tuple[Payload, ...] | None, origin: object) -> Record:
    if shared is None:
        detail = "the shared file holds no change of this tensor. Make the delta again with this shared file."
        raise ArtifactError(origin, _CHECK, detail, record.name)
    reference, *own = record.payloads
    if len(shared) + len(own) > MAX_PAYLOADS:
        detail = f"{len(shared)} shared payloads and {len(own)} of its own are more than {MAX_PAYLOADS}."
        raise ArtifactError(origin, _CHECK, detail, record.name)
    try:
        scaled = [replace(payload, scale=payload.scale * reference.scale) for payload in shared]
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
