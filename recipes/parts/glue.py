"""The tasks of GLUE and a few beside them: their columns, their classes and their official metrics."""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import BinaryF1Score, MulticlassAccuracy, MulticlassMatthewsCorrCoef

from dtrain.errors import InputError

PAIR = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")


@dataclass(frozen=True)
class GlueTask:
    """What a model has to tell from one text or two.

    Args:
        name: Key of `TASKS`, which is also the name of GLUE's configuration.
        columns: Names of the text columns.
        labels: Names of the classes in the order of their ids; none where a number is to be found.
        metrics: Keys of the official metrics; the first one is monitored.
        validation: Names of the validation splits; the first one is monitored.
    """

    name: str
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)

    @property
    def outputs(self) -> int:
        """Outputs of the head: one per class, or the number itself."""
        return len(self.labels) or 1


@dataclass(frozen=True)
class Texts:
    """One split of a task.

    Args:
        rows: The text or the texts of every example.
        labels: Class ids (int64), or the numbers to find (float32).
    """

    rows: list[tuple[str, ...]]
    labels: Tensor


TASKS = {
    task.name: task
    for task in (
        GlueTask("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews",)),
        GlueTask("sst2", ("sentence",), ("negative", "positive")),
        GlueTask("mrpc", PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        GlueTask("stsb", PAIR, (), ("pearson", "spearman")),
        GlueTask("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        GlueTask(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        GlueTask("qnli", ("question", "sentence"), ENTAILMENT),
        GlueTask("rte", PAIR, ENTAILMENT),
        GlueTask("wnli", PAIR, ("not_entailment", "entailment")),
        GlueTask("subj", ("sentence",), ("subjective", "objective")),  # not of GLUE, in its form
        GlueTask("word_order", ("sentence",), ("swapped", "intact")),
        GlueTask("next_sentence", PAIR, ("unrelated", "follows")),
    )
}

#: The task of a data set that has several, where none is asked for.
FIRST = {"english": "word_order", "nyu-mll/glue": "sst2"}


def find_task(dataset: str, name: str | None = None) -> GlueTask:
    """Return the task called `name`, or the one that a folder of data is named after.

    Raises:
        InputError: If there is no such task.
    """
    found = name or FIRST.get(dataset, Path(dataset).name)
    if found not in TASKS:
        hint = "" if name else f" --data.dataset {dataset} is not named after one: set --data.task."
        raise InputError(f"there is no task {found!r}; there are {', '.join(TASKS)}.{hint}")
    return TASKS[found]


def task_metrics(task: GlueTask) -> MetricCollection:
    """Return the official metrics of a task; they take class ids, or the numbers of a regression."""
    return MetricCollection({name: make_metric(name, len(task.labels)) for name in task.metrics})


class Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation as scikit-learn and GLUE have it: answers, or labels, of one class correlate with nothing.

    TorchMetrics divides by a small number there: 0.41 for three equal answers of which one is wrong.
    """

    def compute(self) -> Tensor:
        value = super().compute()
        constant = any(int((self.confmat.sum(side) > 0).sum()) < 2 for side in (0, 1))
        return torch.zeros_like(value, dtype=torch.float32) if constant else value


def make_metric(name: str, classes: int) -> Metric:
    """Return a metric by its key in `GlueTask.metrics`."""
    if name == "accuracy":
        return MulticlassAccuracy(classes, average="micro")
    if name == "f1":
        return BinaryF1Score()
    if name == "matthews":
        return Matthews(classes)
    if name == "pearson":
        return PearsonCorrCoef()
    with warnings.catch_warnings():  # it keeps all predictions, which for a validation split is no matter
        warnings.simplefilter("ignore", UserWarning)
        return SpearmanCorrCoef()


def answers(task: GlueTask, logits: Tensor) -> Tensor:
    """Return what a model's outputs say: class ids, or the numbers of a regression."""
    return logits.argmax(-1) if task.labels else logits.squeeze(-1)
