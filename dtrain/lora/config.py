"""What `adapter_config.json` may say, and what of it goes into a delta file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from dtrain.errors import InputError

#: Entries that leave the merged weight at W + scaling * B A. Any other that is set may be a variant with more to it.
_HARMLESS = frozenset(
    (
        *("peft_type", "task_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias", "lora_bias"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
        *("init_lora_weights", "eva_config", "lora_dropout", "inference_mode", "runtime_config"),
        *("megatron_core", "qalora_group_size"),  # defaults of variants that are off unless another entry is set
    )
)
#: Initialisations that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) take from it what A and B hold.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def check_config(config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return a configuration as plain JSON, sets as sorted lists.

    Raises:
        InputError: If it is no configuration of LoRA, or says that there is more to the adapter than two factors.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(dict(config), default=sorted, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: the configuration is no plain JSON ({error}). Give config.to_dict().") from error
    kind = plain.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{origin} is an adapter of type {kind!r}; dtrain reads 'LORA'. Merge it with PEFT instead.")
    more = sorted(key for key, value in plain.items() if value and key not in _HARMLESS)
    if plain.get("init_lora_weights", True) not in _INITIALISATIONS:
        more.append("init_lora_weights")
    if more:
        raise InputError(
            f"{origin} sets {more[0]}={plain[more[0]]!r}, so it may be more than scaling * B A on the base. "
            "Merge it with PEFT's merge_and_unload() and give the merged model."
        )
    for number, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        _check_numbers(plain, number, patterns, origin)
    saved = cast("object", plain.get("modules_to_save") or [])
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in cast("list[object]", saved)):
        raise InputError(f"{origin}: modules_to_save must be a list of names, got {saved!r}. Save it with PEFT.")
    return plain


def scaling(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return (rank, scaling) of a module: the first pattern that matches its name decides, else the default."""
    rank = int(_pattern(config.get("rank_pattern"), module, config["r"]))
    alpha = float(_pattern(config.get("alpha_pattern"), module, config["lora_alpha"]))
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what PEFT needs to load the adapter anywhere: no nulls, which are its defaults, and no path."""
    kept = {key: value for key, value in config.items() if value is not None}
    if not _is_hub_id(str(kept.get("base_model_name_or_path", ""))):
        kept.pop("base_model_name_or_path", None)
    return kept


def _check_numbers(config: Mapping[str, Any], number: str, patterns: str, origin: str) -> None:
    found = cast("object", config.get(patterns) or {})
    if not isinstance(found, dict):
        raise InputError(f"{origin}: {patterns} must be an object, got {found!r}. Save the adapter with PEFT.")
    for value in (cast("object", config.get(number)), *cast("dict[str, object]", found).values()):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or (number == "r" and not _is_rank(value)):
            expected = "positive integers" if number == "r" else "numbers"
            raise InputError(f"{origin}: {number} and {patterns} must be {expected}, got {value!r}. Save it with PEFT.")
    for pattern in cast("dict[str, object]", found):
        try:
            re.compile(_ending(pattern))
        except re.error as error:
            raise InputError(f"{origin}: {patterns} has {pattern!r}, which is no pattern ({error}).") from error


def _is_rank(value: float) -> bool:
    return isinstance(value, int) and value > 0


def _pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    found = (value for pattern, value in (patterns or {}).items() if re.match(_ending(pattern), module))
    return next(found, default)


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"  # as PEFT matches: the end of a module's name, from a dot on


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None and not Path(name).exists()
