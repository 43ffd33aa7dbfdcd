"""The delta file: what it holds, how it is written and how every part of it is checked before it is used."""

from dtrain.artifact.file import FORMAT_VERSION, pack_file, read_file, unpack_file, write_file
from dtrain.artifact.records import DIGEST_BYTES, Content, Record, Role

__all__ = [
    "DIGEST_BYTES",
    "FORMAT_VERSION",
    "Content",
    "Record",
    "Role",
    "pack_file",
    "read_file",
    "unpack_file",
    "write_file",
]
