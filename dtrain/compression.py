"""`compress`: from two models to a delta."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from dtrain.artifact import DIGEST_BYTES, Content, Record, Role, file_digest
from dtrain.codes import dense, fresh_values, vector_values
from dtrain.delta import Delta, load
from dtrain.difference import Change, digests, fingerprint, pair
from dtrain.encoding import Task, check_finite, delta_of, encode_matrices
from dtrain.errors import InputError, NeedsDataError
from dtrain.fit import Calibration, Fit, Objective, Watch, calibrate, fit_of
from dtrain.methods import Dbms, Inputs, Method
from dtrain.rules import PATTERNS, FreshCode, Rules
from dtrain.stages import HALF, SHARED, Bits, Packed, Payload, Pipeline, Zstd, encode
from dtrain.stages.select import All
from dtrain.weights import Source, Weights, read_weights, tensor_bytes, zeros

#: Bits per weight from which on norms and biases take eight bits a value: one bit would lose more there than in all
#: matrices, and eight add about one byte in fifty.
_FINE_BITS = 0.5


def compress(
    base: Source | None,
    finetuned: Source,
    method: Method,
    *,
    fit: Fit | None = None,
    objective: Objective | None = None,
    calibration: Calibration | None = None,
    rules: Rules | None = None,
    shared: Delta | str | Path | None = None,
    training: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Delta:
    """Compress what fine-tuning changed.

    Args:
        base: The model before fine-tuning: a module, a state dict, or the path of a `.safetensors` file, a Hugging Face
            folder or a `.ckpt`. None stands for one that is zero everywhere, as for `dtrain.lora_factors`.
        finetuned: The model after it, likewise. bfloat16 and float16 are first-class; arithmetic is float32.
        method: How to compress the weights, such as `DareX(keep=0.01)`.
        fit: How scales are found after encoding, such as `Learn()`; None for the method's own way, which is none for
            most and a search for `DareX` and `Dbms`.
        objective: What scales are fitted to, on training inputs, where the fit asks for it.
        calibration: Training inputs that show what every layer's weight is multiplied with, where method or fit ask.
        rules: Which tensor is treated how; the defaults suit any transformer.
        shared: The base vector of the family, as `shared_base` makes it or its file, for `Dbms(source="shared")`.
        training: How the model was fine-tuned, JSON-serialisable, kept in the file. No times, paths or hosts.
        watch: Called with a number and the loss after every evaluation or step of the fit.

    Returns:
        The delta. `delta.save(path)` writes it, `print(delta.report())` shows what it costs.

    Raises:
        InputError: If the models cannot be paired, do not differ, or hold NaN or inf (bitwise methods keep those).
        NeedsDataError: If the method or the fit needs an objective, a calibration or a base vector.
    """
    if not isinstance(method, Method):  # pyright: ignore[reportUnnecessaryIsInstance] - the likeliest slip of all
        raise InputError(f"`method` must be a method such as dtrain.Dare(keep=0.1), got {method!r}.")
    _check_json(training)
    fit = fit_of(method, fit)
    _check_data(method, fit, objective, calibration)
    if shared is not None and not (isinstance(method, Dbms) and method.source == "shared"):
        raise InputError(f"`shared` is for Dbms(source='shared'), and the method is {method!r}. Leave it out.")
    rules = _fitting(rules or Rules(), method, base)
    tuned = read_weights(finetuned)
    changes = pair(_zeros_for(tuned) if base is None else read_weights(base), tuned, rules)
    if method.bitwise:
        changes = [replace(c, role="bits") if c.role in ("method", "vector", "half") else c for c in changes]
    method, inputs, unseen = _inputs(method, fit, changes, calibration)
    family = load(shared) if isinstance(shared, (str, Path)) else shared
    hashes = digests({change.name: change.base for change in changes if change.base is not None})
    others = {c.name: _encode(c, method, rules) for c in changes if c.role != "method"}
    records = {c.name: _record(c, others.get(c.name, ()), hashes) for c in changes}
    task = Task(changes, records, inputs, family, fit, objective, watch)
    method, payloads, summary = encode_matrices(task, method)
    records |= {name: replace(records[name], payloads=payloads[name]) for name in payloads}
    metadata = {**tuned.notes, **unseen, **_provenance(method, rules, changes, summary, training)}
    used = family.content if family is not None and _refers(records.values()) else None
    digest = b"" if used is None else file_digest(used)
    return Delta(Content(tuple(records.values()), _fingerprint(changes, hashes), metadata, digest), shared=used)


def _provenance(
    method: Method, rules: Rules, changes: Sequence[Change], fit: Mapping[str, Any], training: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return what the file says of its method, of the rules, of the fit, and of the training."""
    bits = {"nominal_bits": method.nominal_bits} if any(change.role == "method" for change in changes) else {}
    told = {"fit": dict(fit), "training": dict(training or {})}
    return {
        "method": method.describe(),
        "rules": _changed_rules(rules),
        **bits,
        **{key: value for key, value in told.items() if value},
    }


def _refers(records: Iterable[Record]) -> bool:
    """Return whether a payload refers to a shared file."""
    return any(item.pipeline == SHARED for record in records for item in record.payloads)


def _inputs(
    method: Method, fit: Fit | None, changes: Sequence[Change], calibration: Calibration | None
) -> tuple[Method, dict[str, Inputs], dict[str, Any]]:
    """Return the method, settled by what was measured, the inputs by tensor name, and which tensors had none."""
    if calibration is None or not (method.needs_calibration or (fit is not None and fit.needs_calibration)):
        return method, {}, {}
    gram = fit is not None and fit.needs_covariance
    method, inputs = calibrate(method, changes, calibration, gram=gram)
    return method, inputs, {"uncalibrated": [c.name for c in changes if c.role == "method" and c.name not in inputs]}


def _fitting(rules: Rules, method: Method, base: Source | None) -> Rules:
    """Return the rules as they suit the method, and a base of zeros, to which nothing is close."""
    if method.bitwise:
        return replace(rules, embeddings=(), fresh="exact")
    if base is None:
        return replace(rules, embeddings=(), vectors="float16" if rules.vectors == "auto" else rules.vectors)
    if rules.vectors == "auto" and method.nominal_bits >= _FINE_BITS:
        return replace(rules, vectors="uniform8")
    return rules


def _zeros_for(tuned: Weights) -> Weights:
    return zeros((name, value.shape, value.dtype) for name, value in tuned.tensors.items() if name not in tuned.fresh)


def _encode(change: Change, method: Method, rules: Rules) -> tuple[Payload, ...]:
    match change.role:
        case "vector":
            return (encode(dense(vector_values(rules.vectors, change.tuned.dtype)), change.name, delta_of(change)),)
        case "half":
            return (encode(HALF, change.name, delta_of(change)),)
        case "bits":
            if change.base is None:
                raise InputError(f"tensor {change.name!r} has no base to be compared with bit for bit.")
            return (_bitwise(change.name, change.tuned, change.base),)
        case "whole":
            check_finite(change.name, change.tuned, allow=method.bitwise)
            return (_whole(change.name, change.tuned, rules.fresh),)
        case _:
            return ()


def _whole(name: str, tuned: Tensor, code: FreshCode) -> Payload:
    quantise = fresh_values(code, tuned.shape, tuned.dtype)
    return encode(dense(quantise), name, tensor_bytes(tuned) if isinstance(quantise, Bits) else tuned.float())


def _bitwise(name: str, tuned: Tensor, base: Tensor) -> Payload:
    bits, raw = Bits(tuned.dtype.itemsize), tensor_bytes(tuned)
    if base.dtype != tuned.dtype:
        raise InputError(
            f"tensor {name!r} is {base.dtype} in the base and {tuned.dtype} in the fine-tuned model. "
            "Cast one of the checkpoints, or use a method that is not bitwise."
        )
    changed = raw ^ tensor_bytes(base)
    coded = encode(Pipeline(All(), bits, Zstd()), name, changed)
    return coded if coded.data.numel() < raw.numel() else encode(Pipeline(All(), bits, Packed()), name, changed)


def _record(change: Change, payloads: tuple[Payload, ...], hashes: Mapping[str, bytes]) -> Record:
    roles = {"method": Role.ADD, "vector": Role.ADD, "half": Role.ADD, "bits": Role.XOR, "whole": Role.WHOLE}
    others = {"same": Role.SAME, "drop": Role.DROP, "embedding": Role.DROP, "base_only": Role.BASE_ONLY}
    digest = hashes[change.name][:DIGEST_BYTES] if change.base is not None else b""
    shape = tuple(change.tuned.shape)
    return Record(change.name, {**roles, **others}[change.role], change.tuned.dtype, shape, digest, payloads)


def _fingerprint(changes: Sequence[Change], hashes: Mapping[str, bytes]) -> bytes:
    """Cover what every base has: not fresh tensors, nor those that the fine-tuned model does not have."""
    return fingerprint((c.name, hashes[c.name]) for c in changes if c.base is not None and c.role != "base_only")


def _check_data(method: Method, fit: Fit | None, objective: Objective | None, calibration: Calibration | None) -> None:
    name = type(method).__name__
    if not isinstance(fit, Fit | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`fit` must be a fit such as dtrain.Learn(), got {fit!r}.")
    if fit is not None and method.bitwise:
        raise InputError(f"{name} has no scales that could be fitted. Leave `fit` out, or use a lossy method.")
    if not isinstance(calibration, Calibration | None):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InputError(f"`calibration` must be dtrain.Calibration(model, batches), got {type(calibration).__name__}.")
    searched = isinstance(method, Dbms) and method.searches_split
    if fit is not None and (fit.needs == "objective" or searched) and objective is None:
        fixed = "numbers for lam and eta need" if isinstance(method, Dbms) else "no fit needs"
        if hasattr(method, "q"):
            fixed = "q='norm' or a number need"
        raise NeedsDataError(
            f"{name} with {type(fit).__name__} fits scales on training inputs but got no objective. Pass "
            f"objective=dtrain.HiddenChange(model, batches) or dtrain.Metric(model, evaluate); {fixed} no data."
        )
    wanted = method if method.needs_calibration else fit if fit is not None and fit.needs_calibration else None
    if wanted is not None and calibration is None:
        seen = "covariance" if wanted.needs_covariance else "inputs"
        raise NeedsDataError(
            f"{type(wanted).__name__} looks at the {seen} of every layer but got no calibration. Pass "
            "calibration=dtrain.Calibration(model, batches) with batches of training inputs."
        )


def _check_json(training: Mapping[str, Any] | None) -> None:
    try:
        json.dumps(dict(training or {}), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"`training` must be plain JSON ({error}). Give numbers, text, lists and dicts.") from error


def _changed_rules(rules: Rules) -> dict[str, Any]:
    """Return the rules that differ from the defaults, so that a file pays only for what was asked for.

    Codes of vectors and fresh tensors need no word where they are the defaults: every payload states its own.
    """
    default = asdict(Rules())
    lists = {key: list(value) if key in PATTERNS else value for key, value in asdict(rules).items()}
    changed = {key: value for key, value in lists.items() if value != list(default[key]) and value != default[key]}
    return {"whole": "heads", "embeddings": "encoders"} | changed
