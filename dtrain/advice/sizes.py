"""What a delta file would weigh: the bytes that no method changes, and the method's own at a few keep rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.codes import dense_bytes, fresh_values, vector_values
from dtrain.difference import Change, ChangeRole
from dtrain.methods.accounting import binary_entropy
from dtrain.rules import Rules
from dtrain.stages import Float16

_HEADER = 544  # bytes of JSON, fingerprint and checksum
_RECORD = 23  # bytes of a tensor in the manifest: name, digest, scale, checksum
#: All roles but that of what only the base has.
_ORDER: tuple[ChangeRole, ...] = ("method", "vector", "half", "whole", "bits", "same", "embedding", "drop")


@dataclass(frozen=True)
class RoleSize:
    """All tensors of one role.

    Args:
        role: What the rules make of them: a role of `dtrain.rules`, or "same" where nothing changed.
        tensors: How many.
        elements: Their elements.
        checkpoint_bytes: Their bytes in the fine-tuned checkpoint.
        file_bytes: Their payload in a delta file, at most; None for "method", whose keep rate decides.
    """

    role: ChangeRole
    tensors: int
    elements: int
    checkpoint_bytes: int
    file_bytes: int | None


@dataclass(frozen=True)
class Expected:
    """An estimate of one file.

    Args:
        keep: Share of the method's elements that is kept.
        bits: Bits of a kept value.
        indexed: Whether the positions are stored, as of the largest changes; those of a random mask cost nothing.
        file_bytes: Bytes of the file.
        ratio: Bytes of the fine-tuned checkpoint / `file_bytes`.
    """

    keep: float
    bits: float
    indexed: bool
    file_bytes: int
    ratio: float


@dataclass(frozen=True)
class Sizes:
    """The tensors of a pair of models by role.

    Args:
        roles: One entry per role that occurs.
        records: Tensors in the file's table, those that only the base has included.
    """

    roles: tuple[RoleSize, ...]
    records: int

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the fine-tuned checkpoint in its own dtypes."""
        return sum(row.checkpoint_bytes for row in self.roles)

    @property
    def elements(self) -> int:
        """Elements of the fine-tuned model."""
        return sum(row.elements for row in self.roles)

    @property
    def method_elements(self) -> int:
        """Elements that the method compresses."""
        return sum(row.elements for row in self.roles if row.role == "method")

    @property
    def fixed_bytes(self) -> int:
        """Bytes that the file has whatever the method does: other tensors, manifest, header."""
        return sum(row.file_bytes or 0 for row in self.roles) + _RECORD * self.records + _HEADER

    def expect(self, keep: float, bits: float, *, indexed: bool = False) -> Expected:
        """Estimate a file.

        Args:
            keep: Share of the method's elements that is kept.
            bits: Bits of a kept value.
            indexed: Whether the positions have to be stored, which costs their entropy.
        """
        per_element = keep * bits + (binary_entropy(keep) if indexed else 0.0)
        size = self.fixed_bytes + math.ceil(self.method_elements * per_element / 8)
        return Expected(keep, bits, indexed, size, self.checkpoint_bytes / size)


def size_up(changes: Sequence[Change], rules: Rules) -> Sizes:
    """Return the sizes of a pair of models."""
    rows = [
        _role(role, found, rules) for role in _ORDER if (found := [change for change in changes if change.role == role])
    ]
    return Sizes(tuple(rows), len(changes))


def _role(role: ChangeRole, changes: Sequence[Change], rules: Rules) -> RoleSize:
    elements = sum(change.tuned.numel() for change in changes)
    size = sum(change.tuned.numel() * change.tuned.dtype.itemsize for change in changes)
    payload = None if role == "method" else sum(_payload(role, change, rules) for change in changes)
    return RoleSize(role, len(changes), elements, size, payload)


def _payload(role: ChangeRole, change: Change, rules: Rules) -> int:
    """Return the bytes of a tensor that no method changes, at most."""
    tuned = change.tuned
    match role:
        case "vector":
            return dense_bytes(vector_values(rules.vectors, tuned.dtype), tuned.shape)
        case "half":
            return dense_bytes(Float16(), tuned.shape)
        case "whole":
            return dense_bytes(fresh_values(rules.fresh, tuned.shape, tuned.dtype), tuned.shape)
        case "bits":
            return tuned.numel() * tuned.dtype.itemsize
        case _:
            return 0
