"""From the deltas of matrices to payloads: encode with a method, and fit the scales."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtrain.artifact import Record, Role, shared_payloads
from dtrain.delta import Delta
from dtrain.difference import Change
from dtrain.errors import InputError
from dtrain.fit import Fit, Objective, Problem, Watch, fit_scales
from dtrain.methods import Dbms, Inputs, Method, Shifted
from dtrain.methods.dbms import SPLITS
from dtrain.methods.method import Deltas, Encoder, Groups
from dtrain.runtime import merged
from dtrain.stages import Payload


class Task(NamedTuple):
    """What stays the same while a method is tried on a pair of models.

    Args:
        changes: All tensors of the fine-tuned model.
        records: One per tensor, by name, with the payloads of all that are not the method's.
        inputs: What tensors are multiplied with, where it was measured.
        family: The shared base vector, where there is one.
        fit: Finds the scales.
        objective: What they are fitted to.
        watch: Called with a number and the loss while they are.
    """

    changes: Sequence[Change]
    records: Mapping[str, Record]
    inputs: Mapping[str, Inputs]
    family: Delta | None
    fit: Fit | None
    objective: Objective | None
    watch: Watch | None


#: The method as it was used, payloads by tensor name, and what the fit of their scales has to say.
Encoded = tuple[Method, dict[str, tuple[Payload, ...]], dict[str, Any]]


def encode_matrices(task: Task, method: Method) -> Encoded:
    """Encode with the method, or, where it leaves its byte split open, with the split of the least loss."""
    if not (isinstance(method, Dbms) and method.searches_split):
        return _by_method(task, method)
    tried = [_by_method(task, replace(method, split=split)) for split in SPLITS]
    return min(tried, key=lambda found: found[2].get("loss", math.inf))


def delta_of(change: Change) -> Tensor:
    """Return a tensor's delta.

    Raises:
        InputError: If it holds NaN or inf.
    """
    return check_finite(change.name, change.delta())


def check_finite(name: str, values: Tensor, *, allow: bool = False) -> Tensor:
    """Return `values`.

    Raises:
        InputError: If they hold NaN or inf, unless that is allowed.
    """
    if values.is_floating_point() and values.numel() and not allow:
        low, high = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            raise InputError(
                f"tensor {name!r} holds NaN or inf. Mend the checkpoint, or keep its bits with Lossless()."
            )
    return values


def _by_method(task: Task, method: Method) -> Encoded:
    changes = {change.name: change for change in task.changes if change.role == "method"}
    deltas = [(name, partial(delta_of, change)) for name, change in changes.items()]
    masks: list[tuple[Encoder, dict[str, Groups]]] = []
    for draw in range(1 if task.fit is None else task.fit.draws):
        encoder = _encoder(method.reseeded(draw), deltas, task)
        masks.append((encoder, {name: _groups(encoder, name, get(), task.inputs.get(name)) for name, get in deltas}))
    encoder, groups = masks[0]
    if task.fit is None or not changes:
        whole = {name: _stored(encoder, found) for name, found in groups.items()}
        return method, {name: tuple(chain(*found)) for name, found in whole.items()}, {}
    rest: dict[str, Tensor] = {}
    if task.objective is not None:
        left = [change for change in task.changes if change.role not in ("method", "base_only")]
        rest = {change.name: merged(task.records[change.name], change.base) for change in left}
    vectors = {change.name: task.records[change.name].payloads for change in task.changes if change.role == "vector"}
    problem = Problem(method, task.changes, masks, vectors, task.inputs, rest, task.objective, task.watch)
    fitted, summary = fit_scales(task.fit, problem)
    return method, {name: tuple(chain(*found)) for name, found in fitted.items()}, summary


def _encoder(method: Method, deltas: Deltas, task: Task) -> Encoder:
    if not isinstance(method, Dbms):
        return method.plan(deltas)
    if task.family is None:
        return method.encoder(deltas)
    added = [record for record in task.records.values() if record.role is Role.ADD]
    return method.encoder(deltas, shared_payloads(added, task.family.content, task.family.origin))


def _groups(encoder: Encoder, name: str, delta: Tensor, inputs: Inputs | None) -> Groups:
    try:
        return encoder.groups(name, delta, inputs) if isinstance(encoder, Shifted) else (encoder(name, delta, inputs),)
    except InputError as error:
        raise InputError(f"tensor {name!r}: {error}") from error


def _stored(encoder: Encoder, groups: Groups) -> Groups:
    return (encoder.stored(groups[0]), groups[1]) if isinstance(encoder, Shifted) else groups
