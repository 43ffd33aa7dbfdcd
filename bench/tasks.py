"""Real tasks to compress: MiniLM on SST-2, SUBJ and CoLA, and small ViTs on five classes they have never seen.

    python -m bench.tasks --task sst2 subj cola cifar digits --seeds 0 1 2 --shared ../shared

Fine-tunes once per seed and keeps the weights and the reference scores under `runs/bench/tasks/`. Sentences: 8,000 of
the training split, or what is left of it after 256 that are held out (SUBJ: 7,744), one epoch of AdamW at 5e-5, scored
on the whole validation split (SST-2 872, SUBJ 2,000, CoLA 516 sentences). CIFAR-10: 400 steps of 64 images, AdamW at
1e-3, scored on the first 2,000 test images; handwritten digits: likewise, on all 225 of the validation split. No weight
decay in any, all learning rates in one cycle. The score is the accuracy; for CoLA it is the correlation of Matthews,
with the accuracy beside it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.functional.classification import binary_matthews_corrcoef
from transformers import AutoModel, AutoTokenizer

import dtrain
from dtrain.artifact.atomic import write_atomic
from parts.images import Images
from parts.probe import probe_answers
from parts.vision_models import load_vit

CACHE = Path("runs/bench/tasks")
HELD_OUT = 128  # training inputs that methods are fitted to, where nothing else is said; none is trained on
RESERVED = 256  # sentences of the shuffled training split that no fine-tune sees; of the images it is HELD_OUT
CIFAR_CLASSES = (1, 3, 5, 7, 9)
CIFAR_STEPS, CIFAR_SCORED = 400, 2000

Batch = tuple[Any, Tensor]  # inputs that the model takes as its only argument, and labels
State = dict[str, Tensor]
Metric = Callable[[Tensor, Tensor], float]  # of answers and labels


@dataclass(frozen=True)
class Training:
    """How the fine-tune was made, for what is trained the same way.

    Args:
        batches: Returns the training batches, in the same order every time.
        steps: How many of them are used.
        lr: Peak learning rate of all weights.
        label_smoothing: Share of the label that goes to all classes.
    """

    batches: Callable[[], Iterable[Batch]]
    steps: int
    lr: float
    label_smoothing: float = 0.0

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int, steps: int | None = None) -> float:
        """Train `model` from the weights that it has, and return the mean loss of the last fifth of the steps."""
        return fine_tune(model, optimizer, self.batches(), steps or self.steps, seed, self.label_smoothing)


@dataclass(frozen=True)
class Task:
    """A base, what fine-tuning made of it, and how good a state of the model is.

    Args:
        name: Key of `TASKS`.
        seed: Seed of the fresh head and of the fine-tuning.
        model: The module; its weights are whatever was loaded last.
        base: Weights before fine-tuning, with the fresh head.
        tuned: Weights after it.
        references: Scores of "base", "linear probe" and "fine-tuned" on `val`.
        held_out: Batches of unlabelled training inputs that methods are fitted to; `model(batch)` takes one.
        val: Batches of inputs and labels that scores are measured on, and nothing else.
        metric: What makes a score of answers and labels.
        training: How the fine-tune was made; None where that is not known.
    """

    name: str
    seed: int
    model: nn.Module
    base: State
    tuned: State
    references: dict[str, float]
    held_out: list[Any]
    val: list[Batch]
    metric: Metric
    training: Training | None = None

    def score(self, state: State) -> float:
        """Load `state`, which stays in the model, and return its score on `val`."""
        return self.scores(state)["score"]

    def scores(self, state: State) -> dict[str, float]:
        """Load `state`, which stays in the model, and return its score and its accuracy on `val`."""
        self.model.load_state_dict(state)
        found, labels = answers(self.model, self.val)
        return {"score": self.metric(found, labels), "accuracy": share_right(found, labels)}

    def objective(self, kind: str = "hidden", batches: int | None = None) -> dtrain.Objective:
        """Load the fine-tuned weights and return what methods are fitted to on the held-out inputs.

        Args:
            kind: "hidden", the change of the last hidden state, or "logits", the mean squared change of the logits.
            batches: How many batches are used, from the last; None for all.
        """
        self.model.load_state_dict(self.tuned)
        inputs = self.held_out if batches is None else self.held_out[-batches:]
        change = dtrain.HiddenChange if kind == "hidden" else dtrain.LogitChange
        return change(self.model, inputs, call)

    def calibration(self) -> dtrain.Calibration:
        """Return the held-out inputs, for methods that look at what the layers see."""
        return dtrain.Calibration(self.model, self.held_out, call)


class Classifier(nn.Module):
    """Mean-pooled encoder and a linear head."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


@dataclass(frozen=True)
class Sentences:
    """Batches of three disjoint parts of a data set."""

    train: list[Batch]
    held_out: list[Batch]  # training sentences that are not trained on
    val: list[Batch]


def read_sentences(
    model: str | Path, data: str | Path, train_size: int, seed: int, held_out: int = HELD_OUT, batch: int = 64
) -> Sentences:
    """Tokenise up to `train_size` training sentences drawn with `seed`, `held_out` others, and the validation split."""
    if not 0 < held_out <= RESERVED:
        raise dtrain.InputError(f"`held_out` must be in 1 to {RESERVED}, got {held_out}. All others are trained on.")
    tokenizer, splits = AutoTokenizer.from_pretrained(str(model)), load_dataset(str(data))
    text = next(name for name in ("sentence", "text") if name in splits["train"].column_names)

    def batches(rows: Any, size: int) -> list[Batch]:
        out = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            inputs = tokenizer(part[text], padding=True, truncation=True, max_length=64, return_tensors="pt")
            out.append((dict(inputs), torch.tensor(part["label"])))
        return out

    shuffled = splits["train"].shuffle(seed=seed)
    held = shuffled.select(range(held_out))
    train = shuffled.select(range(RESERVED, min(RESERVED + train_size, len(shuffled))))
    val = splits["validation"].map(lambda row: {"length": len(row[text])}).sort("length")  # less padding, same score
    return Sentences(batches(train, 32), batches(held, batch), batches(val, 64))


def text_model(folder: str | Path, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier(AutoModel.from_pretrained(str(folder)))


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


def fine_tune_sentences(model: nn.Module, data: Sentences, seed: int, lr: float = 5e-5) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    fine_tune(model, optimizer, data.train, len(data.train), seed)


def fine_tune_images(model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, steps: int, seed: int) -> None:
    fine_tune(model, optimizer, training_images(data), steps, seed, label_smoothing=0.1)


def fine_tune(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    steps: int,
    seed: int,
    label_smoothing: float = 0.0,
) -> float:
    """Train for `steps` with one cycle of the optimizer's rate; return the mean loss of the last fifth of them."""
    torch.manual_seed(seed)
    model.train()
    peak = optimizer.defaults["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for step, (inputs, labels) in enumerate(islice(batches, steps)):
        loss = cross_entropy(model(inputs), labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            sys.stderr.write(f"step {step}/{steps} loss {losses[-1]:.3f}\n")
    return fmean(losses[-max(1, steps // 5) :])


@torch.no_grad()
def answers(model: nn.Module, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """Return the model's answers and the labels; the model is left in evaluation mode."""
    model.eval()
    pairs = [(model(inputs).argmax(-1), labels) for inputs, labels in batches]
    return torch.cat([found for found, _ in pairs]), torch.cat([labels for _, labels in pairs])


def share_right(found: Tensor, labels: Tensor) -> float:
    return float((found == labels).double().mean())


def matthews(found: Tensor, labels: Tensor) -> float:
    return float(binary_matthews_corrcoef(found, labels))


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of right answers; the model is left in evaluation mode."""
    return share_right(*answers(model, batches))


def call(module: nn.Module, inputs: Any) -> Tensor:
    return module(inputs)


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [(json.dumps(value, indent=1) + "\n").encode()])


def sentences(name: str, shared: Path, seed: int, held_out: int, batch: int, metric: Metric) -> Task:
    """Return MiniLM fine-tuned on a data set of single sentences, from the cache where it is there."""
    folder = shared / "models/all-MiniLM-L6-v2"
    data = read_sentences(folder, shared / "data" / name, 8000, seed, held_out, batch)
    model = text_model(folder, seed)
    inputs = [inputs for inputs, _ in data.held_out]
    training = Training(lambda: data.train, len(data.train), 5e-5)
    return cached(name, seed, model, training, lambda: data.train, inputs, data.val, metric)


def sst2(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return MiniLM fine-tuned on the sentiment of film reviews."""
    return sentences("sst2", shared, seed, held_out, batch, share_right)


def subj(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return MiniLM fine-tuned to tell opinions of a film from its plot."""
    return sentences("subj", shared, seed, held_out, batch, share_right)


def cola(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return MiniLM fine-tuned on the acceptability of sentences."""
    return sentences("cola", shared, seed, held_out, batch, matthews)


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


#: Tasks by name: of the folder of data and models, the seed, how many unlabelled inputs and of what batch.
TASKS: dict[str, Callable[..., Task]] = {"sst2": sst2, "subj": subj, "cola": cola, "cifar": cifar, "digits": digits}


def task(name: str, shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return the task of a name: one of `TASKS`, or `module:function` of one's own with the same arguments.

    Raises:
        InputError: If there is none.
    """
    if name in TASKS:
        return TASKS[name](shared, seed, held_out, batch)
    module, _, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise dtrain.InputError(
            f"there is no task {name!r} ({error}). Use one of {', '.join(TASKS)}, or `module:function`, where the "
            "function returns a bench.tasks.Task: base and fine-tuned weights, unlabelled inputs, and what scores them."
        ) from error
    return make(shared, seed, held_out, batch)


def cached(
    name: str,
    seed: int,
    model: nn.Module,
    training: Training,
    train: Callable[[], Iterable[Batch]],
    held_out: list[Any],
    val: list[Batch],
    metric: Metric,
) -> Task:
    """Return the task, fine-tuning and measuring the references where the cache does not have them."""
    base, weights = snapshot(model), CACHE / f"{name}_{seed}.safetensors"
    if not weights.exists():
        training.run(model, torch.optim.AdamW(model.parameters(), training.lr, weight_decay=0.0), seed)
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(weights, [save(snapshot(model))])
    tuned, references = load_file(weights), weights.with_suffix(".json")
    if not references.exists():
        pairs: dict[str, tuple[Tensor, Tensor]] = {}
        for label, state in (("fine-tuned", tuned), ("base", base)):
            model.load_state_dict(state)
            pairs[label] = answers(model, val)
        pairs["linear probe"] = probe_answers(model, train(), val)
        found = {label: metric(*pair) for label, pair in pairs.items()}
        if metric is not share_right:
            found |= {f"{label}, accuracy": share_right(*pair) for label, pair in pairs.items()}
        write_json(references, found)
    return Task(name, seed, model, base, tuned, json.loads(references.read_text()), held_out, val, metric, training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    arguments = parser.parse_args()
    for name, seed in product(arguments.task, arguments.seeds):
        task = TASKS[name](arguments.shared, seed)
        sys.stderr.write(f"{task.name} {seed}: {task.references}\n")


if __name__ == "__main__":
    main()
