"""The delta file: what it holds, how it is written and how every part of it is checked before it is used."""

from dtrain.artifact.file import FORMAT_VERSION, file_digest, pack_file, read_file, unpack_file, write_file
from dtrain.artifact.records import DIGEST_BYTES, Content, Record, Role
from dtrain.artifact.shared import find_shared, resolve, shared_payloads

__all__ = [
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "Content",
    "Record",
    "Role",
    "file_digest",
    "find_shared",
    "pack_file",
    "read_file",
    "resolve",
    "shared_payloads",
    "unpack_file",
    "write_file",
]
