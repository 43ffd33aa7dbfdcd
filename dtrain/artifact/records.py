"""What a delta file holds, in memory: one record per tensor, each with the payloads that make up its change."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch

from dtrain.errors import InputError
from dtrain.stages import SHARED, Payload

DIGEST_FILE = 32  # bytes of the SHA-256 that ends a file
MAX_PAYLOADS = 255  # of a tensor
DIGEST_BYTES = 4  # of a tensor's SHA-256: names the tensor that differs; the fingerprint has all 32


class Role(IntEnum):
    """What a record does to the base's tensor of its name."""

    ADD = 0  #: W0 + sum of scale * decode(payload)
    XOR = 1  #: the bits of W0 xor the payload: bitwise exact
    WHOLE = 2  #: the payload replaces the tensor; the base's own, if any, is not looked at
    SAME = 3  #: the fine-tuned tensor equals the base's
    DROP = 4  #: the change was thrown away by an explicit rule
    BASE_ONLY = 5  #: the fine-tuned model does not have this tensor


@dataclass(frozen=True)
class Record:
    """One tensor of the fine-tuned model.

    Args:
        name: Its name.
        role: What the record does.
        dtype: Its dtype in the fine-tuned checkpoint.
        shape: Its shape.
        digest: First 4 bytes of the SHA-256 of the base's tensor; empty for `WHOLE`.
        payloads: Any number for `ADD`, one for `XOR` and `WHOLE`, none otherwise.
    """

    name: str
    role: Role
    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: bytes = b""
    payloads: tuple[Payload, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """Bytes of all payloads."""
        return sum(payload.data.numel() for payload in self.payloads)


@dataclass(frozen=True)
class Content:
    """All of a delta file.

    Args:
        records: One per tensor, ascending by the UTF-8 bytes of the name.
        fingerprint: SHA-256 over the base's tensors that the records refer to.
        metadata: JSON-serialisable provenance: method, rules, training. No times, paths or hosts.
        shared: The SHA-256 that ends the shared file, where a payload refers to it (`stages.SHARED`); else none.

    Raises:
        InputError: If `shared` is given without such a payload or missing with one, or if one is not the first.
    """

    records: tuple[Record, ...]
    fingerprint: bytes
    metadata: dict[str, Any] = field(default_factory=dict[str, Any])
    shared: bytes = b""

    def __post_init__(self) -> None:
        uses = [[item.pipeline == SHARED for item in record.payloads] for record in self.records]
        if any(any(used[1:]) for used in uses):
            raise InputError("a reference to the shared file stands behind another payload. Put it first.")
        if len(self.shared) != (DIGEST_FILE if any(map(any, uses)) else 0):
            raise InputError(
                f"{sum(map(any, uses))} tensors refer to a shared file, but its SHA-256 has {len(self.shared)} bytes. "
                f"Give all {DIGEST_FILE} where a tensor refers to it, else none."
            )
