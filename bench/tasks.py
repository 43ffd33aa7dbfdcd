"""Two real tasks to compress: MiniLM on SST-2 and a small ViT on five CIFAR-10 classes it has never seen.

    python -m bench.tasks --task sst2 --seeds 0 1 2 --shared ../shared

Fine-tunes once per seed and keeps the weights and the reference scores under `runs/bench/tasks/`. SST-2: 8,000 training
sentences, one epoch of AdamW at 5e-5, scored on all 872 validation sentences. CIFAR-10: 400 steps of 64 images, AdamW
at 1e-3, scored on the first 2,000 test images. No weight decay in either, both learning rates in one cycle.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModel, AutoTokenizer

import dtrain
from dtrain.artifact.atomic import write_atomic
from parts.images import Images
from parts.probe import probe_accuracy
from parts.vision_models import load_vit

CACHE = Path("runs/bench/tasks")
HELD_OUT = 128  # training inputs that are not trained on: methods are fitted to them
CIFAR_CLASSES = (1, 3, 5, 7, 9)
CIFAR_STEPS, CIFAR_SCORED = 400, 2000

Batch = tuple[Any, Tensor]  # inputs that the model takes as its only argument, and labels
State = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A base, what fine-tuning made of it, and how good a state of the model is.

    Args:
        name: "sst2" or "cifar".
        seed: Seed of the fresh head and of the fine-tuning.
        model: The module; its weights are whatever was loaded last.
        base: Weights before fine-tuning, with the fresh head.
        tuned: Weights after it.
        references: Scores of "base", "linear probe" and "fine-tuned" on `val`.
        held_out: Batches of training inputs that were not trained on, 128 in all; `model(batch)` takes one.
        val: Batches of inputs and labels that scores are measured on, and nothing else.
    """

    name: str
    seed: int
    model: nn.Module
    base: State
    tuned: State
    references: dict[str, float]
    held_out: list[Any]
    val: list[Batch]

    def score(self, state: State) -> float:
        """Load `state`, which stays in the model, and return its accuracy on `val`."""
        self.model.load_state_dict(state)
        return accuracy(self.model, self.val)

    def objective(self) -> dtrain.Objective:
        """Load the fine-tuned weights and return the change of the last hidden state on the held-out inputs."""
        self.model.load_state_dict(self.tuned)
        return dtrain.HiddenChange(self.model, self.held_out, call)

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
    """Batches of the three disjoint parts of SST-2."""

    train: list[Batch]
    held_out: list[Batch]  # training sentences that are not trained on
    val: list[Batch]


def read_sentences(model: str | Path, data: str | Path, train_size: int, seed: int) -> Sentences:
    """Tokenise `train_size` training sentences drawn with `seed`, 128 others, and the validation split."""
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
    held = shuffled.select(range(HELD_OUT))
    train = shuffled.select(range(256, 256 + train_size))
    val = splits["validation"].map(lambda row: {"length": len(row[text])}).sort("length")  # less padding, same score
    return Sentences(batches(train, 32), batches(held, 64), batches(val, 64))


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


def plain_images(data: Images, split: str, limit: int | None = None) -> Iterator[Batch]:
    """Yield the first `limit` images of a split in order, without augmentation."""
    images, labels = (part[:limit] for part in data.split(split))
    for pair in zip(images.split(256), labels.split(256), strict=True):
        yield data.normalise(pair)


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
) -> None:
    """Train for `steps` with one cycle of the optimizer's learning rate."""
    torch.manual_seed(seed)
    model.train()
    peak = optimizer.defaults["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.1)
    for step, (inputs, labels) in enumerate(islice(batches, steps)):
        loss = cross_entropy(model(inputs), labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            sys.stderr.write(f"step {step}/{steps} loss {loss.detach():.3f}\n")


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of right answers; the model is left in evaluation mode."""
    model.eval()
    right = [model(inputs).argmax(-1) == labels for inputs, labels in batches]
    return float(torch.cat(right).double().mean())


def call(module: nn.Module, inputs: Any) -> Tensor:
    return module(inputs)


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a run that is killed leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, [(json.dumps(value, indent=1) + "\n").encode()])


def sst2(shared: Path, seed: int) -> Task:
    """Return MiniLM fine-tuned on SST-2, from the cache where it is there."""
    folder = shared / "models/all-MiniLM-L6-v2"
    data, model = read_sentences(folder, shared / "data/sst2", 8000, seed), text_model(folder, seed)
    held_out = [inputs for inputs, _ in data.held_out]
    return cached(
        "sst2", seed, model, lambda: fine_tune_sentences(model, data, seed), lambda: data.train, held_out, data.val
    )


def cifar(shared: Path, seed: int) -> Task:
    """Return the small ViT fine-tuned on five CIFAR-10 classes, from the cache where it is there."""
    data = Images(str(shared / "data/cifar10"), classes=CIFAR_CLASSES, calibration=HELD_OUT, seed=seed)
    model = vision_model(shared / "models/vit-cifar", seed)

    def tune() -> None:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.0)
        fine_tune_images(model, optimizer, data, CIFAR_STEPS, seed)

    held_out = [images for images, _ in plain_images(data, "calibration")]
    val = list(plain_images(data, "val", CIFAR_SCORED))
    return cached("cifar", seed, model, tune, lambda: plain_images(data, "train"), held_out, val)


TASKS: dict[str, Callable[[Path, int], Task]] = {"sst2": sst2, "cifar": cifar}


def cached(
    name: str,
    seed: int,
    model: nn.Module,
    tune: Callable[[], None],
    train: Callable[[], Iterable[Batch]],
    held_out: list[Any],
    val: list[Batch],
) -> Task:
    """Return the task, fine-tuning with `tune` and measuring the references where the cache does not have them."""
    base, weights = snapshot(model), CACHE / f"{name}_{seed}.safetensors"
    if not weights.exists():
        tune()
        weights.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(weights, [save(snapshot(model))])
    tuned, references = load_file(weights), weights.with_suffix(".json")
    if not references.exists():
        found = {}
        for label, state in (("fine-tuned", tuned), ("base", base)):
            model.load_state_dict(state)
            found[label] = accuracy(model, val)
        write_json(references, {**found, "linear probe": probe_accuracy(model, train(), val)})
    return Task(name, seed, model, base, tuned, json.loads(references.read_text()), held_out, val)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shared", type=Path, default=Path("../shared"), help="folder with data/ and models/")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        task = TASKS[arguments.task](arguments.shared, seed)
        sys.stderr.write(f"{task.name} {seed}: {task.references}\n")


if __name__ == "__main__":
    main()
