"""What the recipes for image classification have in common: how a network is trained, and the picture in the end."""

from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from dtrain.callbacks import DeltaCompressionCallback
from parts.compare import compare
from parts.images import Images, Labelled
from parts.probe import probe_accuracy
from parts.recipe import RecipeCLI
from parts.training import seed_batch, warmup_then_cosine

LOOKED_AT = {"train": 20, "val": 8, "calibration": 1}  # batches of 256 images


class Classifier(L.LightningModule):
    """Fine-tunes a network that maps images to logits.

    Args:
        model: The network.
        num_classes: Its outputs.
        lr: Peak learning rate of AdamW; it warms up over a tenth of the steps and falls as a cosine.
        label_smoothing: Share of the label that goes to all classes.
    """

    def __init__(self, model: nn.Module, num_classes: int, lr: float, label_smoothing: float) -> None:
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=num_classes)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_train_batch_start(self, batch: Labelled, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: Labelled, _: int) -> Tensor:
        images, labels = self.trainer.datamodule.augmented(batch)
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Labelled, _: int) -> None:
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return warmup_then_cosine(self, self.lr)


def picture(cli: RecipeCLI, callback: DeltaCompressionCallback) -> None:
    """Draw what other keep rates would have cost, on a part of the images: a picture is a matter of minutes."""
    model, data = cli.model.model, cli.datamodule
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train, val, calibration = (batches(data, name, most, device) for name, most in LOOKED_AT.items())
    compare(
        model,
        callback,
        callback.read_base(cli.trainer),
        score=lambda: accuracy(model, val),
        probe=lambda: probe_accuracy(model, train, val),
        inputs=[(part,) for images, _ in calibration for part in images.chunk(4)],
        title=f"{Path(data.dataset).name}: {sum(len(labels) for _, labels in val)} images",
    )


def batches(data: Images, name: str, most: int, device: torch.device) -> list[Labelled]:
    """Return the first batches of a part of the data, normalised, without augmentation."""
    loader = DataLoader(data.part(name), 256, num_workers=data.workers)
    return [data.normalise((images.to(device), labels.to(device))) for images, labels in islice(loader, most)]


@torch.no_grad()
def accuracy(model: nn.Module, split: list[Labelled]) -> float:
    model.eval()
    right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in split)
    return right / sum(len(labels) for _, labels in split)
