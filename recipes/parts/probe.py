"""The true floor of a fine-tune: a linear classifier on the frozen features of the base."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression, RidgeCV
from torch import Tensor, nn

from dtrain.fit import HiddenCapture

Batches = Iterable[tuple[Any, Tensor]]  # what the model takes, in a tuple if it is more than one thing; and labels


@torch.no_grad()
def features(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Return what the last linear layer of `model` gets to see, and the labels."""
    model.eval()
    seen: list[Tensor] = []
    labels: list[Tensor] = []
    with HiddenCapture(model) as capture:
        for inputs, label in batches:
            model(*inputs) if isinstance(inputs, tuple) else model(inputs)
            seen.append(capture.last.flatten(1).cpu())
            labels.append(label.cpu())
    return torch.cat(seen), torch.cat(labels)


def probe_answers(base: nn.Module, train: Batches, val: Batches) -> tuple[Tensor, Tensor]:
    """Return what a logistic regression on the base's features answers to the validation inputs, and their labels."""
    return linear_answers(features(base, train), features(base, val))


@torch.no_grad()
def probe_states(look: Callable[[Any], Tensor], train: Batches, val: Batches) -> tuple[Tensor, Tensor]:
    """Return what a linear model answers that sees of every batch what `look` makes of it, and the labels."""
    sides = [[(look(inputs).cpu(), labels.cpu()) for inputs, labels in batches] for batches in (train, val)]
    seen, asked = (tuple(torch.cat(part) for part in zip(*side, strict=True)) for side in sides)
    return linear_answers(seen, asked)


def linear_answers(train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return what a linear model of the training features answers to the validation features, and their labels.

    It is a logistic regression, or, where the labels are numbers, a ridge regression whose strength is chosen by
    leaving out one training row at a time.
    """
    (x, y), (x_val, y_val) = train, val
    mean, std = x.mean(0), x.std(0) + 1e-6
    numbers = y.is_floating_point()
    model = RidgeCV(alphas=[10.0**power for power in range(-2, 6)]) if numbers else LogisticRegression(max_iter=500)
    probe = model.fit(((x - mean) / std).numpy(), y.numpy())
    return torch.from_numpy(probe.predict(((x_val - mean) / std).numpy())).to(y_val.dtype), y_val


def probe_accuracy(base: nn.Module, train: Batches, val: Batches) -> float:
    """Return the validation accuracy of a logistic regression on the base's features of the training images."""
    answers, labels = probe_answers(base, train, val)
    return float((answers == labels).double().mean())
