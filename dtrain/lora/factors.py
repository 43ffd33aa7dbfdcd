"""`lora_factors`: an adapter's own tensors; `save_adapter`: from their delta back to a folder that PEFT loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save

from dtrain.artifact.atomic import write_folder
from dtrain.delta import Delta
from dtrain.errors import InputError
from dtrain.lora.adapter import ADAPTER_WEIGHTS, AdapterSource, read_adapter
from dtrain.weights import ADAPTER_CONFIG, Weights


def lora_factors(adapter: AdapterSource) -> Weights:
    """Read the tensors of a LoRA adapter, to be compressed themselves: their delta is to zero.

    `dtrain.compress(None, dtrain.lora_factors("adapter/"), dtrain.Dare(keep=0.5))` drops in A and in B, each under a
    mask of its own. Two masks square the variance: a term b_ik a_kj of the product survives with probability keep^2,
    so the variance of (BA)_ij is (1/keep^2 - 1) sum_k (b_ik a_kj)^2. Dropping in the product, as `lora_product`
    allows, has (1/keep - 1) (BA)_ij^2, and errors that are independent: here a dropped element of A takes part in a
    whole column. Training starts from a random A and from B = 0, so A is no small change to anything.
    `Rules(include=["*lora_B*"])` drops in B alone, under one mask, and keeps A in half precision.

    Args:
        adapter: A PEFT folder, or (state dict, configuration) of an adapter.

    Returns:
        The tensors under PEFT's names. Trained biases and saved modules are no factors: they are stored whole. The
        configuration comes along, into the delta's metadata.

    Raises:
        InputError: If it is no plain LoRA adapter.
    """
    read = read_adapter(adapter)
    return Weights(read.tensors, origin=read.origin, fresh=read.whole, notes={"adapter": read.config})


def save_adapter(delta: Delta, folder: str | Path) -> int:
    """Write the folder that `peft.PeftModel.from_pretrained` loads: all of it, or nothing.

    Args:
        delta: Made by `dtrain.compress(None, dtrain.lora_factors(...), ...)`.
        folder: A new folder, or an empty one.

    Returns:
        Bytes of `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        InputError: If the delta is not one of a LoRA adapter, or if the folder cannot be written.
        BaseMismatchError: If its base is not zero.
    """
    config = delta.content.metadata.get("adapter")
    if not isinstance(config, dict):
        raise InputError(
            f"{delta.origin} has no configuration of an adapter. Make the delta with dtrain.compress(None, "
            "dtrain.lora_factors(adapter), method)."
        )
    state = delta.state_dict(None)
    read_adapter((state, cast("dict[str, Any]", config)))  # a file may claim anything: what is written is an adapter
    files = {
        ADAPTER_WEIGHTS: save(state, metadata={"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }
    write_folder(folder, files)
    return sum(map(len, files.values()))
