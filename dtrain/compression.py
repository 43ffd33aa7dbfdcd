"""`compress`: from two models to a delta."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dtrain.artifact import DIGEST_BYTES, Content, Record, Role
from dtrain.delta import Delta
from dtrain.difference import Change, digests, fingerprint, pair
from dtrain.errors import InputError, NeedsDataError
from dtrain.fit import Calibration, Objective, calibrate, search_q
from dtrain.methods import Inputs, Method, Rescaled
from dtrain.methods.method import Encoder
from dtrain.rules import HEADS, Rules
from dtrain.runtime import merged
from dtrain.stages import HALF, Bits, Packed, Payload, Pipeline, Zstd, encode
from dtrain.stages.select import All
from dtrain.weights import Source, Weights, read_weights, tensor_bytes, zeros


def compress(
    base: Source | None,
    finetuned: Source,
    method: Method,
    *,
    objective: Objective | None = None,
    calibration: Calibration | None = None,
    rules: Rules | None = None,
    training: Mapping[str, Any] | None = None,
) -> Delta:
    """Compress what fine-tuning changed.

    Args:
        base: The model before fine-tuning: a module, a state dict, or the path of a `.safetensors` file, a Hugging Face
            folder or a `.ckpt`. None stands for one that is zero everywhere, as for `dtrain.lora_factors`.
        finetuned: The model after it, likewise. bfloat16 and float16 are first-class; arithmetic is float32.
        method: How to compress the weights, such as `DareX(keep=0.01)`.
        objective: What the method's scales are fitted to, on training inputs, where it has to be fitted.
        calibration: Training inputs that show what every layer's weight is multiplied with, where the method asks.
        rules: Which tensor is treated how; the defaults suit any transformer.
        training: How the model was fine-tuned, JSON-serialisable, kept in the file. No times, paths or hosts.

    Returns:
        The delta. `delta.save(path)` writes it, `print(delta.report())` shows what it costs.

    Raises:
        InputError: If the models cannot be paired, do not differ, or hold NaN or inf (bitwise methods keep those).
        NeedsDataError: If the method needs an objective or a calibration and there is none.
    """
    if not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance] - the likeliest slip of all
        raise InputError(f"`method` must be a method such as dtrain.Dare(keep=0.1), got {method!r}.")
    _check_json(training)
    _check_data(method, objective, calibration)
    rules = rules or Rules()
    tuned = read_weights(finetuned)
    changes = pair(_zeros_for(tuned) if base is None else read_weights(base), tuned, rules)
    if method.bitwise:
        changes = [replace(c, role="bits") if c.role in ("method", "half") else c for c in changes]
    metadata: dict[str, Any] = {"rules": _changed_rules(rules), **tuned.notes}
    inputs: dict[str, Inputs] = {}
    if calibration is not None and method.needs_calibration:
        method, inputs = calibrate(method, changes, calibration)
        metadata["uncalibrated"] = [c.name for c in changes if c.role == "method" and c.name not in inputs]
    metadata["method"] = method.describe()
    encoder = method.plan([(change.name, partial(_delta, change)) for change in changes if change.role == "method"])
    payloads = {change.name: _encode(change, method, encoder, inputs.get(change.name)) for change in changes}
    if any(change.role == "method" for change in changes):
        metadata["nominal_bits"] = method.nominal_bits
    if training:
        metadata["training"] = dict(training)
    hashes = digests({change.name: change.base for change in changes if change.base is not None})
    records = [_record(change, payloads[change.name], hashes) for change in changes]
    if isinstance(method, Rescaled) and method.needs == "objective" and objective is not None:
        records, metadata["fit"] = _fit(method, changes, records, objective)
    return Delta(Content(tuple(records), _fingerprint(changes, hashes), metadata))


def _zeros_for(tuned: Weights) -> Weights:
    return zeros((name, value.shape, value.dtype) for name, value in tuned.tensors.items() if name not in tuned.fresh)


def _encode(change: Change, method: Method, encoder: Encoder, inputs: Inputs | None) -> tuple[Payload, ...]:
    match change.role:
        case "method":
            delta = _delta(change)
            try:
                return encoder(change.name, delta, inputs)
            except InputError as error:
                raise InputError(f"tensor {change.name!r}: {error}") from error
        case "half":
            return (encode(HALF, change.name, _delta(change)),)
        case "bits":
            if change.base is None:
                raise InputError(f"tensor {change.name!r} has no base to be compared with bit for bit.")
            return (_bitwise(change.name, change.tuned, change.base),)
        case "whole":
            _finite(change.name, change.tuned, allow=method.bitwise)
            return (_bitwise(change.name, change.tuned, None),)
        case _:
            return ()


def _bitwise(name: str, tuned: Tensor, base: Tensor | None) -> Payload:
    bits = Bits(tuned.dtype.itemsize)
    raw = tensor_bytes(tuned)
    if base is None:
        return encode(Pipeline(All(), bits, Packed()), name, raw)
    if base.dtype != tuned.dtype:
        raise InputError(
            f"tensor {name!r} is {base.dtype} in the base and {tuned.dtype} in the fine-tuned model. "
            "Cast one of the checkpoints, or use a method that is not bitwise."
        )
    plain, coded = (encode(Pipeline(All(), bits, code), name, raw ^ tensor_bytes(base)) for code in (Packed(), Zstd()))
    return min(plain, coded, key=lambda payload: payload.data.numel())


def _delta(change: Change) -> Tensor:
    return _finite(change.name, change.delta())


def _finite(name: str, values: Tensor, *, allow: bool = False) -> Tensor:
    if values.is_floating_point() and values.numel() and not allow:
        low, high = torch.aminmax(values.float() if values.dtype.itemsize == 1 else values)
        if not (math.isfinite(float(low)) and math.isfinite(float(high))):
            raise InputError(
                f"tensor {name!r} holds NaN or inf. Mend the checkpoint, or keep its bits with Lossless()."
            )
    return values


def _record(change: Change, payloads: tuple[Payload, ...], hashes: Mapping[str, bytes]) -> Record:
    roles = {"method": Role.ADD, "half": Role.ADD, "bits": Role.XOR, "whole": Role.WHOLE}
    others = {"same": Role.SAME, "drop": Role.DROP, "base_only": Role.BASE_ONLY}
    digest = hashes[change.name][:DIGEST_BYTES] if change.base is not None else b""
    shape = tuple(change.tuned.shape)
    return Record(change.name, {**roles, **others}[change.role], change.tuned.dtype, shape, digest, payloads)


def _fingerprint(changes: Sequence[Change], hashes: Mapping[str, bytes]) -> bytes:
    """Cover what every base has: not fresh tensors, nor those that the fine-tuned model does not have."""
    return fingerprint((c.name, hashes[c.name]) for c in changes if c.base is not None and c.role != "base_only")


def _fit(
    method: Rescaled, changes: Sequence[Change], records: Sequence[Record], objective: Objective
) -> tuple[list[Record], dict[str, Any]]:
    rest = {
        record.name: merged(record, change.base)
        for record, change in zip(records, changes, strict=True)
        if change.role not in ("method", "base_only")
    }
    fit = search_q(method, changes, rest, objective)
    scaled = [
        replace(r, payloads=tuple(replace(p, scale=p.scale / fit.q[r.name]) for p in r.payloads))
        if r.name in fit.q
        else r
        for r in records
    ]
    start = fit.start if math.isfinite(fit.start) else None  # at 1/keep the model may overflow
    q = sorted(fit.q.values()) or [1.0]
    summary = {"objective": objective.label, "q": [q[0], q[-1]], "loss": fit.loss, "loss_at_dare": start}
    return scaled, {**summary, "evaluations": fit.evaluations}


def _check_data(method: Method, objective: Objective | None, calibration: Calibration | None) -> None:
    name = type(method).__name__
    if not isinstance(calibration, Calibration | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`calibration` must be dtrain.Calibration(model, batches), got {type(calibration).__name__}.")
    if method.needs == "objective" and objective is None:
        raise NeedsDataError(
            f"{name} searches q on training inputs but got no objective. Pass "
            "objective=dtrain.HiddenChange(model, batches) or dtrain.Metric(model, evaluate), or fix q: q='norm' or a "
            "number need no data."
        )
    if method.needs_calibration and calibration is None:
        raise NeedsDataError(
            f"{name} looks at the {method.needs} of every layer but got no calibration. Pass "
            "calibration=dtrain.Calibration(model, batches) with batches of training inputs."
        )


def _check_json(training: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(training or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"`training` must be plain JSON ({error}). Give numbers, text, lists and dicts.") from error


def _changed_rules(rules: Rules) -> dict[str, Any]:
    """Return the rules that differ from the defaults, so that a file pays only for what was asked for."""
    default = asdict(Rules())
    changed = {key: list(value) for key, value in asdict(rules).items() if value != default[key]}
    return changed | ({"whole": "heads"} if rules.whole == HEADS else {})
