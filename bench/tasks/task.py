"""A base, what fine-tuning makes of it, and how good a state of the model is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrain
from bench.record import write_json
from dtrain.artifact.atomic import write_atomic
from parts.probe import probe_answers

CACHE = Path("runs/bench/tasks")
HELD_OUT = 128  # training inputs that methods are fitted to, where nothing else is said; none is trained on

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

    def run(self, model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
        """Train `model` from the weights that it has, and return the mean loss of the last fifth of the steps."""
        return fine_tune(model, optimizer, self.batches(), self.steps, seed, self.label_smoothing)


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
        sizes: Bytes by knob of every entry that has been tried, by its label: those for one budget help with the next.
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
    sizes: dict[str, dict[float, int]] = field(default_factory=dict[str, dict[float, int]])

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


def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Return the share of right answers; the model is left in evaluation mode."""
    return share_right(*answers(model, batches))


def call(module: nn.Module, inputs: Any) -> Tensor:
    return module(inputs)


def snapshot(model: nn.Module) -> State:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


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
