"""Images and labels: the digits that ship with scikit-learn, a Hub data set, or a local folder of Parquet or images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from dtrain.errors import InputError
from parts.image_folders import class_names, has_class_folders, read_folders
from parts.sampling import in_two

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

Labelled = tuple[Tensor, Tensor]  # uint8 images (n, 3, height, width) and int64 labels (n,)


class Images(L.LightningDataModule):
    """Labelled images, decoded once and kept in memory if not in folders; crops and flips are drawn per batch.

    Args:
        dataset: `digits`, a Hub data set such as `uoft-cs/cifar10`, a folder of Parquet files in the Hub's schema, or
            a folder with train/CLASS/*.jpg and val/CLASS/*.jpg, whose images are decoded when their batch comes.
        revision: Revision of a Hub data set.
        classes: Labels to use, renumbered from 0; all of them if empty.
        batch_size: Images per batch.
        image_size: Side to which images are resized; 0 leaves them as they are.
        train_limit: Use this many training images at most; 0 for all.
        calibration: Training images that are held out, for fitting scales; never used for training.
        augment: Random crops and flips while training. Digits are not flipped: it would change what they are.
        seed: Order of the training images, together with the epoch.
        mean: Mean of the red, green and blue values of the base's pre-training, in [0, 1].
        std: Their standard deviation.
        crop: Share of the shorter side that is seen of an image in a folder; the base's evaluation says which.
        workers: Processes that decode the images in folders.
    """

    def __init__(
        self,
        dataset: str = "digits",
        revision: str = "main",
        classes: Sequence[int] = (),
        batch_size: int = 64,
        image_size: int = 0,
        train_limit: int = 0,
        calibration: NonNegativeInt = 128,
        augment: bool = True,
        seed: int = 0,
        mean: Sequence[float] = CIFAR_MEAN,
        std: Sequence[float] = CIFAR_STD,
        crop: float = 1.0,
        workers: int = 0,
    ) -> None:
        super().__init__()
        self.dataset, self.revision, self.classes = dataset, revision, list(classes)
        self.batch_size, self.image_size, self.train_limit, self.seed = batch_size, image_size, train_limit, seed
        self.calibration, self.augment, self.flip = calibration, augment, dataset != "digits"
        self.mean, self.std, self.crop, self.workers = list(mean), list(std), crop, workers
        self._parts: dict[str, Dataset] = {}

    @property
    def num_classes(self) -> int:
        """Number of classes in use."""
        if self.classes or has_class_folders(self.dataset):
            return len(self.classes or class_names(Path(self.dataset) / "train"))
        return int(self.split("train")[1].max()) + 1

    @property
    def side(self) -> int:
        """Width of the images that the model gets."""
        return self.image_size or self.part("val")[0][0].shape[-1]

    def split(self, name: str) -> Labelled:
        """Return all images and labels of a part that is kept in memory."""
        return self.part(name).tensors

    def part(self, name: str) -> Dataset:
        """Return "train", "calibration" (held out of the training images) or "val"."""
        if not self._parts:
            train, val = self.read()
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
            held, rest = order[: self.calibration], order[self.calibration :][: self.train_limit or None]
            if len(rest) < self.batch_size:
                raise InputError(f"{len(rest)} training images are left; give more, or a smaller --data.batch_size.")
            self._parts = {"train": take(train, rest), "calibration": take(train, held), "val": val}
        return self._parts[name]

    def read(self) -> tuple[Dataset, Dataset]:
        """Return all images for training and all for validation."""
        if has_class_folders(self.dataset):
            return read_folders(Path(self.dataset), self.classes, self.image_size, self.crop)
        if self.dataset == "digits":
            train, val = (choose(part, self.classes) for part in read_digits())
        else:
            train, val = read_parquet(self.dataset, self.revision, self.classes)
        return TensorDataset(*train), TensorDataset(*val)

    def train_dataloader(self) -> DataLoader:
        data = self.part("train")
        order = Shuffled(len(data), self.seed)
        return DataLoader(data, self.batch_size, sampler=order, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.part("val"), 256, num_workers=self.workers)

    def calibration_dataloader(self) -> DataLoader:
        """Give DeltaCompressionCallback training images that were not trained on, in a fixed order."""
        data = self.part("calibration")
        return DataLoader(data, in_two(len(data), self.batch_size), num_workers=self.workers)

    def on_after_batch_transfer(self, batch: Labelled, dataloader_idx: int) -> Labelled:
        return self.normalise(batch)

    def normalise(self, batch: Labelled) -> Labelled:
        """Return what the model takes: float, resized, with mean 0 and variance 1."""
        images = batch[0].float() / 255
        if self.image_size and images.shape[-1] != self.image_size:
            images = interpolate(images, size=self.image_size, mode="bicubic", antialias=True).clamp_(0, 1)
        mean, std = (torch.tensor(value, device=images.device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        return (images - mean) / std, batch[1]

    def augmented(self, batch: Labelled) -> Labelled:
        """Return a training batch with its images shifted and mirrored at random, if that was asked for."""
        return (crop_and_flip(batch[0], self.flip), batch[1]) if self.augment else batch


class Shuffled(Sampler[int]):
    """A permutation drawn from seed and epoch; `parts.training.OrderOfEpoch` says which one it is."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def take(data: Dataset, places: Tensor) -> Dataset:
    """Return a part of a data set: of tensors a copy, which is faster to read, of others a view."""
    if isinstance(data, TensorDataset):
        return TensorDataset(*(tensor[places] for tensor in data.tensors))
    return Subset(data, places.tolist())


def crop_and_flip(images: Tensor, flip: bool) -> Tensor:
    """Shift every image by up to an eighth of its side and, if asked, mirror half of them."""
    count, _, _, side = images.shape
    margin = side // 8
    padded = pad(images, (margin,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * margin + 1, (2, count, 1), device=images.device)
    step = torch.arange(side, device=images.device)
    columns = torch.where(torch.rand(count, 1, device=images.device) < 0.5 * flip, step.flip(0), step) + left
    rows, which = step + top, torch.arange(count, device=images.device)
    return padded[which[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def choose(part: Labelled, classes: Sequence[int]) -> Labelled:
    """Keep the given classes and renumber them from 0."""
    images, labels = part
    if not classes:
        return part
    check_classes(classes, labels.tolist())
    keep = torch.isin(labels, torch.tensor(classes))
    return images[keep], torch.tensor([classes.index(label) for label in labels[keep].tolist()])


def check_classes(classes: Sequence[int], labels: Sequence[int]) -> None:
    """Raise an InputError if a class does not occur."""
    if missing := sorted(set(classes) - set(labels)):
        raise InputError(f"--data.classes names {missing}, but the data set has the labels {sorted(set(labels))}.")


def read_digits() -> tuple[Labelled, Labelled]:
    """Return scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; every fourth is for validation."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images * 255 / 16).round().to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    is_val = torch.arange(len(labels)) % 4 == 0
    return (images[~is_val], labels[~is_val]), (images[is_val], labels[is_val])


def read_parquet(dataset: str, revision: str, classes: Sequence[int]) -> tuple[Labelled, Labelled]:
    """Return the train and test (or validation) split of a Hub data set or a local folder in its schema."""
    from datasets import load_dataset

    local = Path(dataset).exists()
    try:
        splits = load_dataset(dataset) if local else load_dataset(dataset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data set {dataset!r} cannot be loaded ({str(error).splitlines()[0]}). "
            "Give a local folder of Parquet files, or run without network: --preset offline."
        ) from error
    val = next((name for name in ("test", "validation") if name in splits), None)
    if "train" not in splits or val is None:
        raise InputError(f"{dataset!r} has the splits {list(splits)}; expected train and test or validation.")
    return to_tensors(splits["train"], classes), to_tensors(splits[val], classes)


def to_tensors(split, classes: Sequence[int]) -> Labelled:  # noqa: ANN001 - a datasets.Dataset
    """Decode the images of the given classes."""
    import numpy as np

    image = next((name for name in ("img", "image") if name in split.column_names), None)
    label = next((name for name in ("label", "fine_label", "labels") if name in split.column_names), None)
    if image is None or label is None:
        raise InputError(f"the columns are {split.column_names}; expected an image column `img` and a `label`.")
    labels = split.with_format("numpy", columns=[label])[label][:]
    check_classes(classes, labels.tolist())
    if classes:  # before anything is decoded: pictures are what takes the time
        split = split.select(np.flatnonzero(np.isin(labels, classes)))
    pictures = [np.asarray(picture.convert("RGB")) for picture in split[image]]
    if len({picture.shape for picture in pictures}) > 1:
        raise InputError("the images have different sizes. Resize them to one size first.")
    images = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
    return choose((images, torch.tensor(split[label][:])), classes)
