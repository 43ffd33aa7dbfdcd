"""Sentences: MiniLM on SST-2, SUBJ and CoLA, and the small RoBERTa of the recipes on the order of words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from torch import Tensor, nn
from torchmetrics.functional.classification import binary_matthews_corrcoef
from transformers import AutoModel, AutoTokenizer

import dtrain
from bench.tasks.task import HELD_OUT, Batch, Metric, Task, Training, cached, fine_tune, share_right
from parts.encoders import encode, quiet
from parts.masked import pretrain_on_english
from parts.texts import ENGLISH, TextData

RESERVED = 256  # sentences of the shuffled training split that no fine-tune sees
ORDER_STEPS, ORDER_LR = 500, 1e-3


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


def fine_tune_sentences(model: nn.Module, data: Sentences, seed: int, lr: float = 5e-5) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    fine_tune(model, optimizer, data.train, len(data.train), seed)


def matthews(found: Tensor, labels: Tensor) -> float:
    return float(binary_matthews_corrcoef(found, labels))


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


def word_order(shared: Path, seed: int, held_out: int = HELD_OUT, batch: int = 64) -> Task:
    """Return the small RoBERTa of the recipes, pre-trained here, fine-tuned to tell sentences with words swapped."""
    del shared  # the sentences come with Python
    data = TextData(ENGLISH, calibration=held_out, seed=seed)
    folder = str(pretrain_on_english())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(seed)
    with quiet():
        model = Classifier(AutoModel.from_pretrained(folder, add_pooling_layer=False))

    def encoded(texts: Any) -> Batch:
        columns, labels = texts
        return encode(tokenizer, columns, 128, torch.device("cpu")), labels

    def epoch(number: int) -> Iterator[Batch]:
        loader = data.train_dataloader()
        loader.sampler.set_epoch(number)
        return map(encoded, loader)

    inputs = [encoded(texts)[0] for texts in data.loader("calibration", batch)]
    val = [encoded(texts) for texts in data.val_dataloader()[0]]
    training = Training(lambda: chain.from_iterable(map(epoch, count())), ORDER_STEPS, ORDER_LR)
    return cached("word_order", seed, model, training, lambda: epoch(0), inputs, val, share_right)
