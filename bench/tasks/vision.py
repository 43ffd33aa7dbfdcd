"""Images: small ViTs on five classes that they have never seen."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.tasks.task import HELD_OUT, Batch, Task, Training, cached, fine_tune, share_right
from parts.images import Images
from parts.vision_models import load_vit

CIFAR_CLASSES = (1, 3, 5, 7, 9)
CIFAR_STEPS, CIFAR_SCORED = 400, 2000


def vision_model(folder: str | Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return load_vit(str(folder), len(CIFAR_CLASSES))


def training_images(data: Images) -> Iterator[Batch]:
    """Yield augmented training batches, epoch after epoch, without end."""
    loader = data.train_dataloader()
    for epoch in count():
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield data.augmented(data.normalise(batch))


def plain_images(data: Images, split: str, limit: int | None = None, batch: int = 256) -> Iterator[Batch]:
    """Yield the first `limit` images of a split in order, without augmentation."""
    images, labels = (part[:limit] for part in data.split(split))
    for pair in zip(images.split(batch), labels.split(batch), strict=True):
        yield data.normalise(pair)


def unlabelled_images(data: Images, count: int, batch: int) -> list[Any]:
    """Return `count` training images without augmentation: those that were trained on, if any, come first.

    No more than `HELD_OUT` are held out of training. A fit that stops early by its last inputs looks at those.
    """
    held = min(count, HELD_OUT)
    trained, untrained = data.split("train")[0][: count - held], data.split("calibration")[0][:held]
    images = torch.cat([trained, untrained])
    return [data.normalise((part, torch.empty(0)))[0] for part in images.split(batch)]


def fine_tune_images(model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, steps: int, seed: int) -> None:
    fine_tune(model, optimizer, training_images(data), steps, seed, label_smoothing=0.1)


def cifar(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 256) -> Task:
    """Return the small ViT fine-tuned on five CIFAR-10 classes, from the cache where it is there."""
    data = Images(str(shared / "data/cifar10"), classes=CIFAR_CLASSES, calibration=HELD_OUT, seed=seed)
    return images("cifar", data, vision_model(shared / "models/vit-cifar", seed), seed, held_out, batch)


def digits(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 256) -> Task:
    """Return a ViT pre-trained here on the even handwritten digits, fine-tuned on the odd ones, scored on all 225."""
    del shared  # the digits come with scikit-learn
    data = Images("digits", classes=CIFAR_CLASSES, calibration=HELD_OUT, seed=seed)
    return images("digits", data, vision_model("digits", seed), seed, held_out, batch)


def images(name: str, data: Images, model: nn.Module, seed: int, held_out: int, batch: int) -> Task:
    training = Training(lambda: training_images(data), CIFAR_STEPS, 1e-3, label_smoothing=0.1)
    inputs = unlabelled_images(data, held_out, batch)
    val = list(plain_images(data, "val", CIFAR_SCORED))
    return cached(name, seed, model, training, lambda: plain_images(data, "train"), inputs, val, share_right)
