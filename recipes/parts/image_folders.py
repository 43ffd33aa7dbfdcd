"""Labelled images in folders, as ImageNet is kept: ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from dtrain.errors import InputError


def has_class_folders(dataset: str) -> bool:
    """Return whether a data set is a folder with a folder for every class."""
    return bool(class_names(Path(dataset) / "train"))


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`; their order numbers the classes."""
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def read_folders(root: Path, classes: Sequence[int], image_size: int, crop: float) -> tuple[Dataset, Dataset]:
    """Return the training and the validation images; each is decoded when it is asked for, none is kept.

    Args:
        root: Folder with `train` and `val`.
        classes: Classes to use, renumbered from 0; all of them if empty.
        image_size: Side of the square that an image becomes.
        crop: Share of the shorter side that the square takes.
    """
    if not image_size:
        raise InputError(f"the images in {root} may have many sizes. Say which one they get: --data.image_size.")
    names, held = class_names(root / "train"), class_names(root / "val")
    if names != held:
        only = {side: sorted(set(a) - set(b)) for side, a, b in (("train", names, held), ("val", held, names))}
        side = "train" if only["train"] else "val"
        raise InputError(
            f"{root} has {len(names)} class folders in train and {len(held)} in val; expected the same ones. "
            f"Only {side} has {only[side][:3]}."
        )
    if classes and (missing := sorted(set(classes) - set(range(len(names))))):
        raise InputError(f"--data.classes names {missing}, but {root} has {len(names)} class folders, from 0 on.")
    train, val = (read_split(root / side, classes, image_size, crop) for side in ("train", "val"))
    mixed = torch.randperm(len(val), generator=torch.Generator().manual_seed(0))  # a first part is of all classes
    return train, Subset(val, mixed.tolist())


def read_split(folder: Path, classes: Sequence[int], image_size: int, crop: float) -> Dataset:
    """Return the images of a split with their labels, as uint8 (3, side, side) and a number."""
    from timm.data import create_transform
    from torchvision.datasets import ImageFolder

    transform = create_transform(image_size, crop_pct=crop, interpolation="bicubic", normalize=False)
    try:
        split = ImageFolder(str(folder), transform=transform, loader=decode)
    except FileNotFoundError as error:  # of a class without images
        raise InputError(f"{folder}: {error}") from error
    if not classes:
        return split
    split.target_transform = list(classes).index
    return Subset(split, [place for place, label in enumerate(split.targets) if label in classes])


def decode(path: str) -> Image.Image:
    """Return the image of a file."""
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:  # also of what is no image, or ends too early
        raise InputError(f"{path} cannot be read as an image ({error}). Remove it, or download it again.") from error
