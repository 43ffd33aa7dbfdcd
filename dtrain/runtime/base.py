"""Make sure that the weights at hand are the base a delta was made from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dtrain.artifact import DIGEST_BYTES, Content, Record, Role
from dtrain.difference import digests, fingerprint
from dtrain.errors import BaseMismatchError
from dtrain.weights import Weights


def find_tensors(content: Content, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors that the records refer to, by the records' names."""
    found = {record.name: weights.get(record.name) for record in content.records}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def check_base(content: Content, weights: Weights, origin: object, *, whole_must_exist: bool = False) -> None:
    """Compare every tensor with the digest in the file.

    Args:
        content: The delta.
        weights: The weights that should be its base.
        origin: The delta's file, for messages.
        whole_must_exist: Whether tensors that the delta brings along must be there, with the right shape, to be filled.

    Raises:
        BaseMismatchError: If a tensor is missing, too many, of another shape, or differs in one bit.
    """
    backed = [record for record in content.records if record.role is not Role.WHOLE]
    fresh = [record for record in content.records if record.role is Role.WHOLE]
    tensors = find_tensors(content, weights)
    required = [record for record in backed if record.role is not Role.BASE_ONLY]
    _refuse(origin, weights, "lacks", [r.name for r in required if r.name not in tensors])
    known = {weights.aliases.get(record.name, record.name) for record in content.records}
    _refuse(origin, weights, "has tensors the delta knows nothing of:", [n for n in weights.tensors if n not in known])
    present = [record for record in backed if record.name in tensors]
    _refuse(origin, weights, "has other shapes for", _reshaped(present, tensors))
    if whole_must_exist:
        _refuse(origin, weights, "lacks, or has other shapes for,", _reshaped(fresh, tensors))
    found = digests({record.name: tensors[record.name] for record in present})
    wrong = [record.name for record in present if found[record.name][:DIGEST_BYTES] != record.digest]
    _refuse(origin, weights, "has other values or another dtype in", wrong)
    if fingerprint((r.name, found[r.name]) for r in required) != content.fingerprint:
        raise BaseMismatchError(f"{origin}: {weights.origin} is not the base: its fingerprint differs.")


def _reshaped(records: Sequence[Record], tensors: dict[str, Tensor]) -> list[str]:
    return [r.name for r in records if r.name not in tensors or tuple(tensors[r.name].shape) != r.shape]


def _refuse(origin: object, weights: Weights, what: str, names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise BaseMismatchError(
            f"{origin}: {weights.origin} is not the base the delta was made from: it {what} {listed}. "
            "Give the model exactly as it was before fine-tuning. A tensor that is fresh in every model, as a "
            "new head is, must be named in `whole` when the delta is made."
        )
