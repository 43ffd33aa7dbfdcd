"""Read the weights of a model, wherever they live: a module, a state dict, safetensors files, a checkpoint."""

from __future__ import annotations

import hashlib
import json
import zipfile
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dtrain.errors import InputError
from dtrain.stages.bits import as_buffer

ADAPTER_CONFIG = "adapter_config.json"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_INSIDE = ("state_dict", "model")  # where a checkpoint keeps its weights: Lightning's name, then that of research code


@dataclass(frozen=True)
class Weights:
    """Named tensors of one model, tied ones once.

    Args:
        tensors: Tensors by name, sorted. Where several names share one tensor, the first name in order has it.
        aliases: The other names of tied tensors, each with the name that has the tensor.
        origin: Where they came from, for messages.
        fresh: Names of tensors that stand for themselves: where the base is zero they are no delta to it, but new.
        notes: What a delta to them has to remember, JSON-serialisable: it goes into the metadata.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str] = field(default_factory=dict[str, str])
    origin: str = "state dict"
    fresh: frozenset[str] = frozenset()
    notes: dict[str, Any] = field(default_factory=dict[str, Any])

    def get(self, name: str) -> Tensor | None:
        """Return the tensor called `name`, by any of its names, or None."""
        return self.tensors.get(self.aliases.get(name, name))


#: What every door of dtrain accepts as a model.
Source = nn.Module | Mapping[str, Tensor] | str | Path | Weights


def read_weights(source: Source) -> Weights:
    """Read all parameters and persistent buffers of `source`.

    Args:
        source: A module, a state dict, or the path of a `.safetensors` file, of a (sharded) Hugging Face folder, or of
            a Lightning `.ckpt` or torch `.pt`/`.pth`/`.bin` file, which is read with `weights_only=True`; the weights
            may be in it under `state_dict` or `model`. `_orig_mod.`, which `torch.compile` puts into names, is taken
            out. The tensors share memory with the source where they can.

    Raises:
        InputError: If there is nothing at the path, or nothing in it that can be read as weights.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, nn.Module):
        return _collect(source.state_dict(keep_vars=False), f"module {type(source).__name__}")
    if isinstance(source, Mapping):
        return _collect(source, "state dict")
    path = Path(source)
    if not path.exists():
        raise InputError(f"{path} does not exist. Give a .safetensors file, a Hugging Face folder or a .ckpt file.")
    if is_adapter(path):
        raise InputError(
            f"{path} is a PEFT adapter, and no model by itself. Give dtrain.lora_product(base, {str(path)!r}), or "
            f"dtrain.lora_factors({str(path)!r}) to compress its factors."
        )
    if path.is_dir():
        return _collect(_read_folder(path), str(path))
    if path.suffix == ".safetensors":
        return _collect(_read_safetensors(path), str(path))
    return _collect(_read_checkpoint(path), str(path))


def zeros(named: Iterable[tuple[str, Sequence[int], torch.dtype]]) -> Weights:
    """Return a base that is zero everywhere, from the names, shapes and dtypes of its tensors. It takes no memory."""
    tensors = {name: torch.zeros((), dtype=dtype).expand(tuple(shape)) for name, shape, dtype in named}
    return Weights(tensors, origin="zeros")


def is_adapter(path: str | Path) -> bool:
    """Return whether `path` is the folder of a PEFT adapter, and of no model."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).exists() for name in (_INDEX, _SINGLE))


def digest(tensor: Tensor) -> bytes:
    """Return the SHA-256 of a tensor's dtype, shape and bytes (little-endian, row-major)."""
    header = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
    sha = hashlib.sha256(header.encode())
    sha.update(as_buffer(tensor_bytes(tensor)))
    return sha.digest()


def tensor_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor, value by value, as uint8 on the CPU; shares memory where it can."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # of one element that was expanded: contiguous by name, and yet no view of bytes
        flat = torch.empty_like(flat, memory_format=torch.contiguous_format).copy_(flat)
    return flat.view(torch.uint8) if flat.dtype != torch.uint8 else flat


def _collect(state: Mapping[str, object], origin: str) -> Weights:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    named = [(str(name).replace("_orig_mod.", ""), value) for name, value in state.items() if isinstance(value, Tensor)]
    if any(not isinstance(name, str) for name in cast("Iterable[object]", state)):
        raise InputError(f"{origin} holds tensors under names that are no text. Give a state dict.")
    for name, value in sorted(named, key=lambda item: item[0]):  # `_extra_state` and the like are no weights
        if name in tensors or name in aliases:
            raise InputError(f"{origin} holds {name!r} twice, once behind `_orig_mod.`. Remove one of them.")
        if value.layout != torch.strided:
            raise InputError(f"{origin}: tensor {name!r} is {value.layout}. Give dense tensors.")
        tensor = value.detach()
        if tensor.is_meta:
            raise InputError(
                f"{origin}: tensor {name!r} is on the meta device and has no values. Load the weights first."
            )
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            aliases[name] = seen[place]
        else:
            seen[place] = name
            tensors[name] = tensor
    if not tensors:
        raise InputError(f"{origin} holds no tensors. Give a model, a state dict or a file of weights.")
    return Weights(tensors, aliases, origin)


def _read_folder(folder: Path) -> dict[str, Tensor]:
    index, names = folder / _INDEX, dict[str, str]()
    if index.exists():
        try:
            names = cast("dict[str, str]", json.loads(index.read_text())["weight_map"])
            strange = [shard for shard in names.values() if Path(shard).name != shard]
            if strange:
                raise ValueError(f"{strange[0]!r} is no file name")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{index} is no index of sharded weights ({error}). Download the folder again.") from error
        shards: Iterable[Path] = [folder / shard for shard in sorted(set(names.values()))]
    else:
        shards = [folder / _SINGLE] if (folder / _SINGLE).exists() else folder.glob("*.safetensors")
    merged: dict[str, Tensor] = {}
    for shard in sorted(shards):
        if not shard.exists():
            raise InputError(f"{folder} lacks the shard {shard.name} that its index names. Download the folder again.")
        part = _read_safetensors(shard)
        if twice := sorted(set(part) & set(merged)):
            raise InputError(f"{folder} holds {twice[0]!r} in two files. Give one of them instead of the folder.")
        merged.update(part)
    if missing := sorted(set(names) - set(merged)):
        raise InputError(f"{folder} lacks {missing[0]!r}, which its index names. Download the folder again.")
    if not merged:
        raise InputError(f"{folder} holds no .safetensors file. Save the model with save_pretrained() or give a file.")
    return merged


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with cast("Any", safe_open(path, framework="pt")) as file:
            return {name: file.get_tensor(name) for name in cast("list[str]", file.keys())}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}). Is the download complete?") from error


def _read_checkpoint(path: Path) -> Mapping[str, object]:
    try:
        mapped = zipfile.is_zipfile(path)  # what torch before 1.6 wrote cannot be memory-mapped
        with torch.serialization.safe_globals([Namespace]):  # the settings of a training script: a bag of values
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the unpickler raises whatever the bytes make it raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read as a checkpoint with weights_only=True ({reason}).") from error
    if isinstance(content, Mapping):
        outer = cast("Mapping[str, object]", content)
        state = next((outer[name] for name in _INSIDE if isinstance(outer.get(name), Mapping)), outer)
        return cast("Mapping[str, object]", state)
    raise InputError(f"{path} is not a checkpoint: expected a dict of tensors, or one with a `state_dict` or `model`.")
