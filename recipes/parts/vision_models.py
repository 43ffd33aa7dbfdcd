"""Vision transformers to start from: timm's, a local folder's, or a small one pre-trained on the spot."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import cross_entropy

from dtrain.artifact.atomic import write_atomic
from dtrain.errors import InputError
from dtrain.progress import progress
from parts.images import Images

CACHE = Path("runs/cache")
DIGITS_VIT = {"img_size": 8, "patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 5}


def load_vit(pretrained: str, num_classes: int) -> VisionTransformer:
    """Return a pre-trained vision transformer with a fresh head.

    Args:
        pretrained: `digits` (pre-trained here and cached), a folder with `config.json` and `model.safetensors`, or the
            name of a timm model, which is downloaded.
        num_classes: Outputs of the fresh head.
    """
    if pretrained == "digits":
        pretrained = str(pretrain_on_digits("vit_digits_base", {"model_args": DIGITS_VIT}))
    folder = Path(pretrained)
    model = from_folder(folder) if folder.is_dir() else from_timm(pretrained)
    model.reset_classifier(num_classes)
    return model


def from_folder(folder: Path) -> nn.Module:
    """Return the model of a folder, with all of its weights."""
    try:
        config = json.loads((folder / "config.json").read_text())
        if "architecture" in config:
            return timm.create_model(f"local-dir:{folder}", pretrained=True)
        model = VisionTransformer(**config["model_args"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(
            f"{folder} holds no vision transformer that can be loaded ({str(error).splitlines()[0]}). Expected "
            "model.safetensors, and a config.json as timm writes it or with the `model_args` of its VisionTransformer."
        ) from error
    return model


def from_timm(name: str) -> nn.Module:
    """Download a model from the Hub by its timm name."""
    try:
        return timm.create_model(name, pretrained=True)
    except RuntimeError as error:
        raise InputError(f"timm has no weights called {name!r} ({error}). See timm.list_pretrained().") from error
    except OSError as error:
        raise InputError(
            f"{name!r} cannot be downloaded ({str(error).splitlines()[0]}). "
            "Give a local folder with --model.pretrained, or run without network: --preset offline."
        ) from error


def pretrain_on_digits(name: str, config: Mapping[str, Any], steps: int = 800) -> Path:
    """Train a small base on the even digits, once, and return its folder.

    Args:
        name: Of its folder in the cache.
        config: What `config.json` will say: `model_args` of a VisionTransformer of five classes and, if it is one
            that timm has a name for, its `architecture`.
        steps: Batches to train on.
    """
    folder = CACHE / name
    if (folder / "model.safetensors").exists():
        return folder
    make = partial(timm.create_model, config["architecture"]) if "architecture" in config else VisionTransformer
    with torch.random.fork_rng(devices=[]):  # whether the base was cached must not change the fine-tuning
        torch.manual_seed(0)
        data = Images(dataset="digits", classes=(0, 2, 4, 6, 8), calibration=0)
        model = make(**config["model_args"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.1)
        loader = data.train_dataloader()
        with progress("pre-training the base on even digits", steps) as advance:
            for step in range(steps):
                if step % len(loader) == 0:
                    loader.sampler.set_epoch(step // len(loader))
                    batches = iter(loader)
                images, labels = data.augmented(data.normalise(next(batches)))
                loss = cross_entropy(model(images), labels, label_smoothing=0.1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.json", [json.dumps(config, indent=1).encode()])
    # Last: its presence says that the folder is whole.
    write_atomic(folder / "model.safetensors", [save(model.state_dict())])
    return folder
