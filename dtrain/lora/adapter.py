"""Read a PEFT adapter: which module has which two factors, and what else it brings along."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from dtrain.errors import InputError
from dtrain.lora.config import check_config, portable, scaling
from dtrain.weights import ADAPTER_CONFIG, read_weights

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's two wrappers around the model
_LINEAR, _EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_WRAPPERS = ("base_layer", "modules_to_save")

#: A PEFT folder, or the state dict that `peft.get_peft_model_state_dict` gives with the configuration as a dict.
AdapterSource = str | Path | tuple[Mapping[str, Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Target:
    """One module of the model and the factors of its change, scaling * B A.

    Args:
        module: Its name in the model that was adapted.
        a: (rank, inputs), for a convolution (rank, channels, *kernel), for an embedding (rank, tokens).
        b: (outputs, rank), for a convolution with a kernel of ones behind.
        bias: What is added to the module's bias before scaling, where B has one.
        embedding: Whether the module is an embedding, whose weight is (tokens, outputs).
        scaling: alpha / rank, or alpha / sqrt(rank).
    """

    module: str
    a: Tensor
    b: Tensor
    bias: Tensor | None
    embedding: bool
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, checked.

    Args:
        tensors: All its tensors under PEFT's names, sorted.
        targets: The modules it changes by two factors.
        whole: The names, among `tensors`, of those that replace a tensor of the model: trained biases, fresh heads.
        config: Its configuration, without what is null or says where the files lay.
        origin: Where it came from, for messages.
    """

    tensors: dict[str, Tensor]
    targets: tuple[Target, ...]
    whole: frozenset[str]
    config: dict[str, Any]
    origin: str


def read_adapter(source: AdapterSource) -> Adapter:
    """Read a LoRA adapter as PEFT saves it, without PEFT.

    Args:
        source: A folder with `adapter_config.json` and `adapter_model.safetensors`, or both as dicts.

    Raises:
        InputError: If it is no LoRA adapter, if it uses an extension of LoRA that is more than two factors, or if a
            tensor is missing, unknown, or not of the rank that the configuration says.
    """
    state, config, origin = _read_folder(Path(source)) if isinstance(source, (str, Path)) else (*source, "adapter")
    config = check_config(config, origin)
    weights = read_weights(state)
    names = sorted([*weights.tensors, *weights.aliases])
    tensors = {name: tensor for name in names if (tensor := weights.get(name)) is not None}
    factors: dict[str, dict[str, Tensor]] = {}
    for name in tensors:
        if (found := _split(name, origin)) is not None:
            factors.setdefault(found[0], {})[found[1]] = tensors[name]
    if not factors:
        raise InputError(f"{origin} holds no LoRA factors. Save the adapter with PEFT's save_pretrained().")
    targets = tuple(_target(module, parts, config, origin) for module, parts in factors.items())
    whole = frozenset(name for name in tensors if _split(name, origin) is None)
    return Adapter(tensors, targets, whole, portable(config), origin)


def model_name(name: str) -> str:
    """Return the name that PEFT's `name` of a module or tensor has in the model without PEFT."""
    return ".".join(part for part in name.removeprefix(PREFIX).split(".") if part not in _WRAPPERS)


def _read_folder(folder: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any], str]:
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}. Give a folder that PEFT's save_pretrained() has written.")
    try:
        config = cast("object", json.loads((folder / ADAPTER_CONFIG).read_text()))
    except (ValueError, OSError) as error:
        raise InputError(f"{folder / ADAPTER_CONFIG} is no JSON ({error}). Download the folder again.") from error
    if not isinstance(config, dict):
        raise InputError(f"{folder / ADAPTER_CONFIG} is no configuration of PEFT. Download the folder again.")
    return read_weights(folder / ADAPTER_WEIGHTS).tensors, cast("dict[str, Any]", config), str(folder)


def _split(name: str, origin: str) -> tuple[str, str] | None:
    """Return (module, kind of factor), or None where the tensor is no factor."""
    if not name.startswith(PREFIX):
        raise InputError(f"{origin}: {name!r} does not start with {PREFIX!r}, as PEFT's names do. Save it with PEFT.")
    for kind in (*_LINEAR, _BIAS, *_EMBEDDING):
        if name.endswith(f".{kind}"):
            return model_name(name.removesuffix(f".{kind}")), kind
    if any(part.startswith("lora_") for part in name.split(".")):
        raise InputError(
            f"{origin}: {name!r} is none of the factors dtrain knows ({', '.join((*_LINEAR, _BIAS, *_EMBEDDING))}). "
            "Save the adapter with PEFT's save_pretrained(), or merge it with PEFT and give the merged model."
        )
    return None


def _target(module: str, parts: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> Target:
    kinds = _EMBEDDING if _EMBEDDING[0] in parts else _LINEAR
    missing = [kind for kind in kinds if kind not in parts]
    if missing or set(parts) - {*kinds, _BIAS}:
        raise InputError(
            f"{origin}: module {module!r} has {', '.join(sorted(parts))} where {' and '.join(kinds)} were expected. "
            "Download the adapter again."
        )
    a, b = parts[kinds[0]], parts[kinds[1]]
    rank, factor = scaling(config, module)
    if min(a.dim(), b.dim()) < 2 or (a.shape[0], *b.shape[1:]) != (rank, rank, *[1] * (b.dim() - 2)):
        raise InputError(
            f"{origin}: the factors of {module!r} are {tuple(a.shape)} and {tuple(b.shape)}, where the configuration "
            f"says rank {rank}. Give the configuration the adapter was saved with."
        )
    return Target(module, a, b, parts.get(_BIAS), kinds is _EMBEDDING, factor)
