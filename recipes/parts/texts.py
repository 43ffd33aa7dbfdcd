"""Data sets of texts: GLUE on the Hub, a folder of Parquet files in its schema, or what is made of English here."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from jsonargparse.typing import NonNegativeInt
from torch.utils.data import DataLoader

from dtrain.errors import InputError
from parts.corpus import next_sentence, word_order
from parts.glue import TASKS, GlueTask, Texts, find_task
from parts.sampling import SimilarLengths, in_two, representative

OFFLINE = {"word_order": word_order, "next_sentence": next_sentence}
ENGLISH = "english"
VAL_BATCH = 64


class TextData(L.LightningDataModule):
    """A task of GLUE: texts, or pairs of texts, as they are; the model has the tokenizer.

    Args:
        dataset: `english`, a Hub data set such as `nyu-mll/glue`, or a folder of Parquet files in its schema.
        task: One of GLUE's tasks, `subj`, `word_order` or `next_sentence`; None is what the folder is named after,
            `word_order` of `english`, and `sst2` of `nyu-mll/glue`.
        revision: Commit, branch or tag of a Hub data set.
        batch_size: Rows per batch.
        calibration: Rows for fitting scales, never used for training: of `english` they come from documents that no
            training row is made of, of any other data set they are held out of the training rows.
        train_limit: Use this many training rows at most; 0 for all.
        seed: Order of the training rows, together with the epoch.
    """

    def __init__(
        self,
        dataset: str = ENGLISH,
        task: str | None = None,
        revision: str = "main",
        batch_size: int = 32,
        calibration: NonNegativeInt = 256,
        train_limit: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.glue = find_task(dataset, task)
        self.dataset, self.task, self.batch_size, self.seed = dataset, self.glue.name, batch_size, seed
        self.parts = hold_out(read_texts(dataset, self.glue, revision), calibration, train_limit)
        if (left := len(self.parts["train"].rows)) < batch_size:
            raise InputError(f"{left} training rows are left; give more, or a smaller --data.batch_size.")
        for name in self.glue.validation:
            order = representative(lengths(self.parts[name]), VAL_BATCH)
            self.parts[name] = chosen(self.parts[name], torch.tensor(order))

    def loader(self, part: str, batch_size: int, **options: Any) -> DataLoader:
        """Return a loader of "train", "calibration" or a validation split; batches have their texts by column."""
        rows = list(zip(self.parts[part].rows, self.parts[part].labels, strict=True))
        return DataLoader(rows, batch_size, **options)

    def some(self, part: str, batch_size: int, batches: int) -> DataLoader:
        """Return a loader of two batches at least, and of as many at most, of rows evenly spaced."""
        texts = self.parts[part]
        step = -(-len(texts.rows) // (batch_size * batches))
        rows = list(zip(texts.rows[::step], texts.labels[::step], strict=True))
        return DataLoader(rows, in_two(len(rows), batch_size))

    def train_dataloader(self) -> DataLoader:
        sampler = SimilarLengths(lengths(self.parts["train"]), self.batch_size, self.seed)
        return self.loader("train", self.batch_size, sampler=sampler, drop_last=True)

    def val_dataloader(self) -> list[DataLoader]:
        return [self.loader(name, VAL_BATCH) for name in self.glue.validation]

    def calibration_dataloader(self, **options: Any) -> DataLoader:
        """Give DeltaCompressionCallback rows that were not trained on, in a fixed order."""
        rows = len(self.parts["calibration"].rows)
        return self.loader("calibration", in_two(rows, self.batch_size), **options)


def hold_out(splits: dict[str, Texts], count: int, train_limit: int) -> dict[str, Texts]:
    """Return splits with `count` rows as "calibration", and with those of "train" that are left, shuffled.

    Rows of a data set count as independent. Where there are rows for the purpose, they are taken instead.

    Raises:
        InputError: If there are, and they are fewer.
    """
    train, own = splits["train"], splits.get("calibration")
    order = shuffled(train)
    if own is None:
        held, order = chosen(train, order[:count]), order[count:]
    elif len(own.rows) < count:
        raise InputError(
            f"--data.calibration is {count}, but {len(own.rows)} rows are held out of training. Give less."
        )
    else:
        held = chosen(own, shuffled(own)[:count])
    return splits | {"train": chosen(train, order[: train_limit or None]), "calibration": held}


def shuffled(texts: Texts) -> torch.Tensor:
    """Return a fixed order of the rows."""
    return torch.randperm(len(texts.rows), generator=torch.Generator().manual_seed(0))


def chosen(texts: Texts, rows: torch.Tensor) -> Texts:
    """Return some rows in the given order."""
    return Texts([texts.rows[row] for row in rows.tolist()], texts.labels[rows])


def lengths(texts: Texts) -> list[int]:
    """Return how many characters every row has."""
    return [sum(map(len, row)) for row in texts.rows]


def read_texts(dataset: str, task: GlueTask, revision: str = "main") -> dict[str, Texts]:
    """Return the split "train" and the validation splits of a task.

    Args:
        dataset: `english` (made here of the standard library's documentation), a folder of Parquet files in the Hub's
            schema, with a folder per task or without, or a Hub data set such as `nyu-mll/glue`.
        task: What to read of it.
        revision: Commit, branch or tag of a Hub data set.

    Raises:
        InputError: If the data set is not to be had, or its splits, columns or labels are not those of the task.
    """
    if dataset == ENGLISH:
        if task.name not in OFFLINE:
            raise InputError(f"--data.dataset {ENGLISH} has the tasks {', '.join(OFFLINE)}, not {task.name!r}.")
        return OFFLINE[task.name]()
    splits = read_folder(Path(dataset), task) if Path(dataset).exists() else read_hub(dataset, task, revision)
    wanted = ("train", *task.validation)
    if missing := [name for name in wanted if name not in splits]:
        raise InputError(f"{dataset!r} has the splits {sorted(splits)}, not {missing}, which {task.name!r} needs.")
    return {name: to_texts(splits[name], task, f"{dataset!r}, split {name!r}") for name in wanted}


def read_folder(folder: Path, task: GlueTask) -> dict[str, Any]:
    """Return the splits of a local folder: Parquet files named as the split, or as the Hub's `split-00000-of-00001`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    places = [folder / task.name, folder / "data", folder]
    place = next((place for place in places if any(place.glob("*.parquet"))), None)
    if place is None:
        raise InputError(f"{str(folder)!r} holds no Parquet files; looked in {', '.join(map(str, places))}.")
    files: dict[str, list[Path]] = {}
    for path in sorted(place.glob("*.parquet")):
        files.setdefault(path.stem.split("-")[0], []).append(path)
    try:
        return {split: pa.concat_tables([pq.read_table(path) for path in paths]) for split, paths in files.items()}
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{str(place)!r} cannot be read ({str(error).splitlines()[0]}).") from error


def read_hub(dataset: str, task: GlueTask, revision: str) -> dict[str, Any]:
    """Download the splits of a Hub data set, of its configuration called as the task if it has one."""
    from datasets import get_dataset_config_names, load_dataset

    try:
        names = get_dataset_config_names(dataset, revision=revision)
        splits = load_dataset(dataset, task.name if task.name in names else None, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data set {dataset!r} at revision {revision!r} cannot be loaded, neither as a local folder nor from the "
            f"Hub ({str(error).splitlines()[0]}). Give a folder of Parquet files with --data.dataset, or run without "
            "network: --preset offline."
        ) from error
    return {name: split.with_format("arrow")[:] for name, split in splits.items()}


def to_texts(table: Any, task: GlueTask, where: str) -> Texts:
    """Return the rows of an Arrow table, with their labels checked against the task."""
    found = table.column_names
    if missing := [name for name in (*task.columns, "label") if name not in found]:
        fits = [other.name for other in TASKS.values() if set(other.columns) <= set(found) and "label" in found]
        hint = f" They fit {', '.join(fits)}: see --data.task." if fits else ""
        raise InputError(f"{where}: the columns are {found}, without {missing}, which {task.name!r} needs.{hint}")
    rows = list(zip(*(table[name].to_pylist() for name in task.columns), strict=True))
    if empty := [index for index, row in enumerate(rows) if not all(isinstance(text, str) for text in row)]:
        raise InputError(f"{where}: row {empty[0]} has no text in {' or '.join(task.columns)}: {rows[empty[0]]}.")
    return Texts(rows, to_labels(table["label"].to_pylist(), task, where))


def to_labels(values: list[Any], task: GlueTask, where: str) -> torch.Tensor:
    """Return class ids or, for a regression, numbers."""
    if not task.labels:
        if wrong := {value for value in values if not isinstance(value, int | float)}:
            raise InputError(f"{where}: {task.name!r} needs numbers as labels, found {sorted(map(repr, wrong))[:5]}.")
        return torch.tensor(values, dtype=torch.float32)
    if wrong := set(values) - set(range(len(task.labels))):
        known = ", ".join(f"{index} ({name})" for index, name in enumerate(task.labels))
        raise InputError(f"{where}: the labels of {task.name!r} are {known}; found {sorted(map(repr, wrong))[:5]}.")
    return torch.tensor([int(value) for value in values])
