"""The group of DeltaDQ that disturbs attention least (arXiv 2410.08666, section 3.2)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dtrain.difference import Change
from dtrain.errors import InputError
from dtrain.fit.calibration import Calibration
from dtrain.fit.trial import Trial
from dtrain.methods import Dbms, DeltaDQ, EoRA, Inputs, Method
from dtrain.progress import progress
from dtrain.stages import rebuild

_LAYERS = 2  # the first layers stand for all: a reading of "early layers as proxy"
#: Names of the query's projection, with that of the key beside it; a fused projection holds query, key, value in turn
#: (which `query_key_value` of BLOOM and GPT-NeoX does head by head: it is not looked at).
_PAIRS = (("query", "key"), ("q_proj", "k_proj"), ("q_lin", "k_lin"), ("to_q", "to_k"), ("q", "k"))
_FUSED = ("qkv", "Wqkv", "c_attn", "in_proj_weight")


def calibrate(
    method: Method, changes: Sequence[Change], calibration: Calibration, *, gram: bool = False
) -> tuple[Method, dict[str, Inputs]]:
    """Measure what every weight sees in the fine-tuned model, and settle what the method searches on it.

    Args:
        method: One that looks at inputs, or whose scales are fitted to them.
        changes: All tensors of the fine-tuned model.
        calibration: Its module is written to, and holds what it held before afterwards.
        gram: Whether to measure covariances even if the method does not ask for them.

    Returns:
        The method, with a number in place of a searched one (its own or its host's), and the inputs by tensor name.
    """
    tuned = {change.name: change.tuned.clone() for change in changes if change.role != "base_only"}
    names = [change.name for change in changes if change.role == "method"]
    with Trial(calibration.module, tuned) as trial:
        trial.write(tuned)
        inputs = calibration.collect(names, gram=gram or method.needs_covariance)
    return _settled(method, changes, inputs), inputs


def _settled(method: Method, changes: Sequence[Change], inputs: Mapping[str, Inputs]) -> Method:
    if isinstance(method, DeltaDQ) and method.group == "search":
        return replace(method, group=search_group(method, changes, inputs))
    if isinstance(method, (EoRA, Dbms)):
        return replace(method, host=_settled(method.host, changes, inputs))
    return method


def search_group(method: DeltaDQ, changes: Sequence[Change], inputs: Mapping[str, Inputs]) -> int:
    """Return the group with the least squared change of the attention scores `Q K^T` of the first layers.

    All heads are taken together. The candidates are alpha times the powers of two, up to a row.

    Raises:
        InputError: If no pair of query and key projections can be told by their names, or if queries share keys.
    """
    found = {change.name: change for change in changes}
    pairs = _projections(inputs)[:_LAYERS]
    if not pairs:
        raise InputError(
            "no query and key projections were found by their names (query/key, q_proj/k_proj, qkv, ...). Give DeltaDQ "
            "a number or group='alpha'."
        )
    for query, key in pairs:
        _check_heads(found[query], found[key], inputs)
    columns = max(inputs[name].norms.numel() for pair in pairs for name in pair)
    groups = [method.alpha << i for i in range(17) if method.alpha << i <= min(columns, 1 << 16)] or [method.alpha]
    errors: dict[int, float] = {}
    with progress("searching the group by attention error", len(groups)) as advance:
        for group in groups:
            fixed = replace(method, group=group)
            errors[group] = sum(_error(fixed, found, inputs, pair) for pair in pairs)
            advance(f"group {group}: {errors[group]:.4g}")
    return min(errors, key=lambda group: errors[group])


def _projections(inputs: Mapping[str, Inputs]) -> list[tuple[str, str]]:
    """Return the names of query and key weights, first layers first; the same name twice where they are fused."""
    pairs: list[tuple[str, str]] = []
    for name in sorted(inputs, key=_by_number):
        stem = name.removesuffix(".weight")
        if stem.endswith(_FUSED):
            pairs.append((name, name))
        for query, key in _PAIRS:
            other = f"{stem.removesuffix(query)}{key}{name[len(stem) :]}"
            if f".{stem}".endswith(f".{query}") and other in inputs:
                pairs.append((name, other))
    return list(dict.fromkeys(pairs))


def _check_heads(query: Change, key: Change, inputs: Mapping[str, Inputs]) -> None:
    """Refuse grouped-query attention: which outputs belong to which head cannot be told from the shapes."""
    queries, keys = (len(inputs[change.name].matrix(change.tuned)) for change in (query, key))
    if queries != (3 * inputs[query.name].norms.numel() if query.name == key.name else keys):
        raise InputError(
            f"the projections {query.name!r} and {key.name!r} have {queries} and {keys} outputs: heads of the query "
            "seem to share keys, which the search cannot follow. Give DeltaDQ a number or group='alpha'."
        )


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sort "layer.2" before "layer.10"."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _error(
    method: DeltaDQ, changes: Mapping[str, Change], inputs: Mapping[str, Inputs], pair: tuple[str, str]
) -> float:
    """Return the relative squared change of the scores of one layer."""
    exact, rough = (
        [_projected(method if lossy else None, changes, inputs[name], name) for name in pair] for lossy in (False, True)
    )
    if pair[0] == pair[1]:  # thirds of one matrix
        exact, rough = (list(both[0].chunk(3, dim=1)[:2]) for both in (exact, rough))
    scores, found = exact[0] @ exact[1].t(), rough[0] @ rough[1].t()
    return float((scores - found).square().sum() / scores.square().sum().clamp_min(1e-300))


def _projected(method: DeltaDQ | None, changes: Mapping[str, Change], seen: Inputs, name: str) -> Tensor:
    """Return the projection of the sampled inputs, float64, by the fine-tuned weights or by the compressed ones."""
    change = changes[name]
    weight = change.tuned.double().cpu()
    if method is not None:
        delta = change.delta().cpu()
        weight = weight - delta.double() + rebuild(method.encode(name, delta), name, delta.shape)
    bias = changes.get(f"{name.removesuffix('weight')}bias")
    out = seen.sample.double() @ seen.matrix(weight).t()
    return out if bias is None else out + bias.tuned.double().cpu()
