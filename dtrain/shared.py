"""`shared_base`: what a family of fine-tunes have in common, as one delta that theirs refer to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from dtrain.artifact import DIGEST_BYTES, Content, Record, Role
from dtrain.delta import Delta
from dtrain.difference import Change, digests, fingerprint, pair
from dtrain.errors import InputError, NeedsDataError
from dtrain.methods import Method
from dtrain.methods.dbms import as_base_vector
from dtrain.methods.method import Encoder, check_choice
from dtrain.rules import Rules
from dtrain.stages import Payload
from dtrain.weights import Source, Weights, read_weights

Merge = Literal["mean", "elect"]
#: The same tensor in every fine-tune.
Family = Sequence[Change]


def shared_base(
    base: Source,
    finetunes: Sequence[Source],
    method: Method,
    *,
    merge: Merge = "mean",
    rules: Rules | None = None,
) -> Delta:
    """Compress what several fine-tunes of one base have in common: the base vector b of `Dbms(source="shared")`.

    It takes in the tensors that every fine-tune changes and that the rules give to the method. Saved, it is an ordinary
    delta file, which turns the base W0 into W0 + b; the delta of a task refers to it by its hash, and `dtrain.load`
    finds it in the folder of the task's file.

    Args:
        base: The model that all were fine-tuned from, as for `dtrain.compress`.
        finetunes: Two models or more. One tensor of each is looked at at a time, so paths take the least memory.
        method: How to compress the merged delta, such as `SeededSign(keep=1 / 16)`; one that needs no data. As for the
            base vector of `Dbms(source="own")`, its random masks are others than those of a delta with the same seed,
            and where it has a q that is 1: what is kept is kept as it is, and lam scales it.
        merge: "mean": their mean. "elect": the unified vector of EMR-Merging (arXiv 2405.17461, the paper's text): the
            sign of the sum, and the greatest magnitude among the deltas that have this sign.
        rules: Which tensors the method may compress, as for `dtrain.compress`.

    Returns:
        The delta. Tensors that only the fine-tunes have are no part of it; those of the base that the rules store
        whole, as fresh heads, are left out, so that it fits the base with or without them.

    Raises:
        InputError: If there are fewer than two fine-tunes, if they change no tensor in common, or hold NaN or inf.
        NeedsDataError: If the method would have to be fitted, or shown inputs.
    """
    method = _checked(finetunes, method, merge)
    weights, rules = read_weights(base), rules or Rules()
    family = _family([pair(weights, read_weights(tuned), rules) for tuned in finetunes])
    vectors = [(name, partial(_MERGES[merge], changes)) for name, changes in family.items()]
    encoder = method.plan(vectors)
    payloads = {name: _encode(encoder, name, vector) for name, vector in vectors}
    metadata: dict[str, Any] = {
        "method": method.describe(),
        "nominal_bits": method.nominal_bits,
        "shared": {"merge": merge, "finetunes": len(finetunes)},
    }
    return Delta(_content(weights, payloads, rules, metadata))


def _checked(finetunes: Sequence[Source], method: Method, merge: Merge) -> Method:
    """Return the method as it compresses a base vector, when all arguments are checked."""
    if isinstance(finetunes, (str, Mapping)) or len(finetunes) < 2:
        raise InputError("`finetunes` must be a list of two models or more: a base vector is what they have in common.")
    if not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`method` must be a method such as dtrain.BitDelta(), got {method!r}.")
    check_choice("merge", merge, tuple(_MERGES))
    name = type(method).__name__
    if method.bitwise:
        raise InputError(f"{name} keeps the bits of one model, and a base vector is no model. Use dtrain.Dare(keep=1).")
    method = as_base_vector(method)
    if method.needs != "nothing":
        raise NeedsDataError(
            f"{name} asks for an objective or a calibration, and a family's base vector is made without data. Use a "
            "method that needs none, such as SeededSign() or BitDelta()."
        )
    return method


def _family(tasks: Sequence[Sequence[Change]]) -> dict[str, Family]:
    """Return the tensors that every fine-tune gives to the method, each with its change in every one of them."""
    found = [{change.name: change for change in changes if change.role == "method"} for changes in tasks]
    names = [name for name, change in found[0].items() if _can_add(change) and all(name in task for task in found)]
    if not names:
        raise InputError(
            f"the {len(tasks)} fine-tunes change no tensor in common that the rules give to the method. Give models "
            "that were fine-tuned from one base, or wider `include` patterns."
        )
    return {name: [task[name] for task in found] for name in names}


def _can_add(change: Change) -> bool:
    """Return whether the base's own dtype has bits enough to add to; that of the fine-tune is seen to by the rules."""
    return change.base is not None and change.base.dtype.itemsize > 1


def _total(changes: Family) -> Tensor:
    total = torch.zeros(changes[0].tuned.shape, dtype=torch.float64, device=changes[0].tuned.device)
    for change in changes:
        total += change.delta().to(total.device)
    if not bool(total.isfinite().all()):
        raise InputError(f"tensor {changes[0].name!r} holds NaN or inf in one of the fine-tunes. Mend the checkpoint.")
    return total


def _mean(changes: Family) -> Tensor:
    return _total(changes).div_(len(changes)).float()


def _elect(changes: Family) -> Tensor:
    sign = _total(changes).sign().float()
    greatest = torch.zeros_like(sign)
    for change in changes:
        greatest = torch.maximum(greatest, change.delta().to(sign.device) * sign)
    return greatest * sign


_MERGES: dict[Merge, Callable[[Family], Tensor]] = {"mean": _mean, "elect": _elect}


def _encode(encoder: Encoder, name: str, vector: Callable[[], Tensor]) -> tuple[Payload, ...]:
    try:
        return encoder(name, vector(), None)
    except InputError as error:
        raise InputError(f"tensor {name!r}: {error}") from error


def _content(
    base: Weights, payloads: Mapping[str, tuple[Payload, ...]], rules: Rules, metadata: dict[str, Any]
) -> Content:
    """Return one record for every tensor of the base, in the base's own dtypes."""
    changed = {base.aliases.get(name, name) for name in payloads}
    tensors = {name: tensor for name, tensor in base.tensors.items() if name not in changed}
    tensors |= {name: tensor for name in payloads if (tensor := base.get(name)) is not None}
    hashes = digests(tensors)
    records: list[Record] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: item[0].encode()):
        shape = tuple(tensor.shape)
        fresh = rules.role(name, shape, tensor.dtype) == "whole"
        role = Role.ADD if name in payloads else Role.BASE_ONLY if fresh else Role.SAME
        digest = hashes[name][:DIGEST_BYTES]
        records.append(Record(name, role, tensor.dtype, shape, digest, payloads.get(name, ())))
    required = fingerprint((record.name, hashes[record.name]) for record in records if record.role != Role.BASE_ONLY)
    return Content(tuple(records), required, metadata)
