"""Make sure that the weights at hand are the base a delta was made from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from torch import Tensor

from dtrain.artifact import DIGEST_BYTES, Content, Record, Role
from dtrain.difference import digests, fingerprint
from dtrain.errors import ArtifactError, BaseMismatchError
from dtrain.weights import Weights, zeros

_ADVICE = (
    "Give the model exactly as it was before fine-tuning. A tensor that is fresh in every model, as a "
    "new head is, must be named in `whole` when the delta is made."
)
_FACTORS = (
    "It is a delta of an adapter's factors to zero: give None, or `zeros` on the command line, and load into PEFT the "
    "folder that dtrain.save_adapter writes."
)
_MAX_ZEROS = 1 << 34  # bytes: a file of a few bytes must not make anyone allocate what its shapes say


def find_tensors(content: Content, weights: Weights) -> dict[str, Tensor]:
    """Return the tensors that the records refer to, by the records' names."""
    found = {record.name: weights.get(record.name) for record in content.records}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def zero_base(content: Content, origin: object) -> Weights:
    """Return the base of a delta that was made from none: zeros of the records' shapes and dtypes.

    Raises:
        ArtifactError: If they would take more than 16 GiB, as no adapter does.
    """
    records = [record for record in content.records if record.role not in (Role.WHOLE, Role.BASE_ONLY)]
    size = sum(math.prod(record.shape) * record.dtype.itemsize for record in records)
    if size > _MAX_ZEROS:
        raise ArtifactError(origin, "size", f"zeros of its shapes would take {size:,} bytes. Give its own base.")
    return zeros((record.name, record.shape, record.dtype) for record in records)


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
    refuse = partial(_refuse, origin, weights, _FACTORS if "adapter" in content.metadata else _ADVICE)
    required = [record for record in backed if record.role is not Role.BASE_ONLY]
    refuse("lacks", [r.name for r in required if r.name not in tensors])
    known = {weights.aliases.get(record.name, record.name) for record in content.records}
    refuse("has tensors the delta knows nothing of:", [n for n in weights.tensors if n not in known])
    present = [record for record in backed if record.name in tensors]
    refuse("has other shapes for", _reshaped(present, tensors))
    if whole_must_exist:
        refuse("lacks, or has other shapes for,", _reshaped(fresh, tensors))
    found = digests({record.name: tensors[record.name] for record in present})
    wrong = [record.name for record in present if found[record.name][:DIGEST_BYTES] != record.digest]
    refuse("has other values or another dtype in", wrong)
    if fingerprint((r.name, found[r.name]) for r in required) != content.fingerprint:
        raise BaseMismatchError(f"{origin}: {weights.origin} is not the base: its fingerprint differs.")


def _reshaped(records: Sequence[Record], tensors: dict[str, Tensor]) -> list[str]:
    return [r.name for r in records if r.name not in tensors or tuple(tensors[r.name].shape) != r.shape]


def _refuse(origin: object, weights: Weights, advice: str, what: str, names: Sequence[str]) -> None:
    if names:
        listed = ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise BaseMismatchError(
            f"{origin}: {weights.origin} is not the base the delta was made from: it {what} {listed}. {advice}"
        )
