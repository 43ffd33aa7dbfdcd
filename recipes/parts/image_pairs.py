"""Two images and a statement, true or false: pairs of digits, or NLVR2 from the Hub or a local folder in its schema."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from dtrain.errors import InputError
from parts.digit_pairs import PairBatch, WordTokenizer, draw_pairs, pad_tokens
from parts.images import Labelled, Shuffled, crop_and_flip, read_digits
from parts.sampling import in_two

Tokenizer = Callable[[str], list[int]]
ANSWERS = {"true": 1, "false": 0, "1": 1, "0": 0}


class ImagePairs(L.LightningDataModule):
    """Pairs of images with a statement about both; a batch is left, right, tokens, padding, labels.

    Args:
        dataset: `digits`, a Hub data set, or a folder of Parquet files with the columns left_image, right_image,
            sentence or question, and label or answer.
        revision: Revision of a Hub data set.
        tokenizer: `words` for the statements about digits, or BEiT-3's sentencepiece file `beit3.spm`.
        kinds: Kinds of statements about digits: shows, same, parity, order; all of them if empty.
        pairs: Pairs of digits to train on; a quarter as many, of other images, validate.
        batch_size: Pairs per batch.
        image_size: Side to which images are resized; digits are 8 pixels wide and stay so.
        calibration: Training pairs that are held out, for fitting scales; never used for training.
        augment: Shift the images at random while training. They are not mirrored: statements speak of left and right.
        workers: Processes that decode images of Parquet files.
        seed: Which pairs of training digits are drawn, and the order of training pairs, together with the epoch.
        mean: Mean of the red, green and blue values of the base's pre-training, in [0, 1].
        std: Their standard deviation.
    """

    def __init__(
        self,
        dataset: str = "digits",
        revision: str = "main",
        tokenizer: str = "words",
        kinds: Sequence[str] = (),
        pairs: int = 8192,
        batch_size: int = 64,
        image_size: int = 8,
        calibration: NonNegativeInt = 128,
        augment: bool = True,
        workers: int = 0,
        seed: int = 0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.dataset, self.revision, self.kinds, self.pairs = dataset, revision, list(kinds), pairs
        self.batch_size, self.image_size, self.calibration = batch_size, image_size, calibration
        self.augment, self.workers, self.seed = augment, workers, seed
        self.mean, self.std = list(mean), list(std)
        self.tokenizer = load_tokenizer(tokenizer)
        self._splits: dict[str, Dataset[Any]] = {}

    def split(self, name: str) -> Dataset[Any]:
        """Return "train", "calibration" (held out of the training images or pairs) or "val"."""
        if not self._splits:
            if self.dataset == "digits":
                self._splits = self.digits()
            else:
                train, val = read_pairs(self.dataset, self.revision, self.tokenizer, self.image_size)
                held, rest = hold_out(len(train), self.calibration)
                self._splits = {"train": Subset(train, rest), "calibration": Subset(train, held), "val": val}
            if (left := len(self._splits["train"])) < self.batch_size:
                raise InputError(f"{left} training pairs are left; give more, or a smaller --data.batch_size.")
        return self._splits[name]

    def digits(self) -> dict[str, Dataset[Any]]:
        """Draw pairs of digits; training, calibration and validation have no image in common."""
        (images, labels), val = read_digits()
        held, rest = hold_out(len(labels), len(labels) // 8)
        pools: dict[str, tuple[Labelled, int, tuple[int, ...]]] = {
            "train": ((images[rest], labels[rest]), self.pairs, (0, self.seed)),
            "calibration": ((images[held], labels[held]), self.calibration, (1,)),
            "val": (val, self.pairs // 4, (2,)),  # the same ones for every seed: their scores are compared
        }
        return {
            name: TensorDataset(*draw_pairs(pool, count, self.kinds, self.tokenizer, seed))
            for name, (pool, count, seed) in pools.items()
        }

    def train_dataloader(self) -> DataLoader:
        data = self.split("train")
        order = Shuffled(len(data), self.seed)
        return DataLoader(data, self.batch_size, sampler=order, drop_last=True, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.split("val"), 2 * self.batch_size, num_workers=self.workers)

    def calibration_dataloader(self) -> DataLoader:
        """Give DeltaCompressionCallback training pairs that were not trained on, in a fixed order."""
        data = self.split("calibration")
        return DataLoader(data, in_two(len(data), self.batch_size), num_workers=self.workers)

    def on_after_batch_transfer(self, batch: PairBatch, dataloader_idx: int) -> PairBatch:
        return self.normalise(batch)

    def normalise(self, batch: PairBatch) -> PairBatch:
        """Return what the model takes: floats with mean 0 and variance 1."""
        mean, std = (torch.tensor(value, device=batch[0].device).view(1, 3, 1, 1) for value in (self.mean, self.std))
        left, right = ((images.float() / 255 - mean) / std for images in batch[:2])
        return left, right, *batch[2:]

    def augmented(self, batch: PairBatch) -> PairBatch:
        """Return a training batch with its images shifted at random, if that was asked for."""
        if not self.augment:
            return batch
        left, right = (crop_and_flip(images, flip=False) for images in batch[:2])
        return left, right, *batch[2:]


def load_tokenizer(name: str) -> Tokenizer:
    """Return the words of the statements about digits, or the sentencepiece model of a file."""
    if name == "words":
        return WordTokenizer()
    from parts.beit3_tokenizer import Beit3Tokenizer

    return Beit3Tokenizer(name)


def hold_out(size: int, held: int) -> tuple[list[int], list[int]]:
    """Return the places that are held out, and the rest; the same ones for every seed."""
    places = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    return places[:held], places[held:]


class ParquetPairs(Dataset[Any]):
    """Rows of a data set in NLVR2's schema; an image is decoded and resized when its pair is asked for.

    Args:
        rows: A `datasets.Dataset`.
        tokenizer: Statement to ids.
        image_size: Side of the square to which images are resized.
    """

    def __init__(self, rows: Any, tokenizer: Tokenizer, image_size: int) -> None:
        statement = find_column(rows.column_names, ("sentence", "question"))
        label = find_column(rows.column_names, ("label", "answer"))
        for side in ("left_image", "right_image"):
            find_column(rows.column_names, (side,))
        named = getattr(rows.features[label], "int2str", str)  # of a ClassLabel
        self.labels = torch.tensor([to_answer(named(value)) for value in rows[label]])
        self.tokens, self.padding = pad_tokens([tokenizer(text) for text in rows[statement]])
        self.rows, self.image_size = rows.select_columns(["left_image", "right_image"]), image_size

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        row = self.rows[index]
        left, right = (to_pixels(row[side], self.image_size) for side in ("left_image", "right_image"))
        return left, right, self.tokens[index], self.padding[index], self.labels[index]


def find_column(columns: Sequence[str], names: Sequence[str]) -> str:
    """Return the first of `names` that is a column."""
    found = next((name for name in names if name in columns), None)
    if found is None:
        raise InputError(
            f"the columns are {list(columns)}; expected left_image, right_image, sentence or question, "
            f"and label or answer: there is no {' or '.join(names)}."
        )
    return found


def to_answer(value: str) -> int:
    """Return 1 for true and 0 for false, as NLVR2 and its mirrors write them."""
    answer = ANSWERS.get(value.strip().lower())
    if answer is None:
        raise InputError(f"{value!r} is no label of a statement; expected True or False.")
    return answer


def to_pixels(picture: Any, side: int) -> Tensor:
    """Return a picture as uint8 (3, side, side)."""
    import numpy as np
    from PIL import Image

    pixels = np.array(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def read_pairs(dataset: str, revision: str, tokenizer: Tokenizer, image_size: int) -> tuple[ParquetPairs, ParquetPairs]:
    """Return the train and the validation (or dev, or test) split of a Hub data set or a local folder in its schema."""
    from datasets import load_dataset

    try:
        splits = load_dataset(dataset) if Path(dataset).exists() else load_dataset(dataset, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data set {dataset!r} cannot be loaded ({str(error).splitlines()[0]}). "
            "Give a local folder of Parquet files, or run without network: --preset offline."
        ) from error
    val = next((name for name in ("validation", "dev", "balanced_dev", "test") if name in splits), None)
    if "train" not in splits or val is None:
        raise InputError(f"{dataset!r} has the splits {list(splits)}; expected train and validation, dev or test.")
    return tuple(ParquetPairs(splits[name], tokenizer, image_size) for name in ("train", val))
