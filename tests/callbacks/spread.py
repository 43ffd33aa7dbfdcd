"""A run on several processes whose weights do not depend on their number, and what each rank sees of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from tests.callbacks.models import Classifier, make_trainer, train_loader, val_loader


class Pulled(Classifier):
    """Learns the same from any data, so that one process and two end at the same weights, bit for bit."""

    def __init__(self):
        super().__init__()
        self.model.norm = nn.BatchNorm1d(16, momentum=0.0)

    def training_step(self, batch, batch_idx):
        self(batch[0])
        return sum((param - 0.5).square().sum() for param in self.parameters())

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", cross_entropy(logits, y), sync_dist=True)
        self.log("val_mine", logits.mean())
        self.log("val_first_rank", 3.0, rank_zero_only=True)

    def on_validation_epoch_end(self):
        pass


class Tell(pl.Callback):
    """Writes what the rank knows, and which files it wrote."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def on_fit_end(self, trainer, pl_module):
        told = {}
        for callback in trainer.callbacks:
            if isinstance(callback, DeltaCompressionCallback):
                told[callback.method.describe()["name"]] = {
                    "scores": callback.outcome.scores,
                    "drop": callback.outcome.drop,
                    "fit": callback.delta.content.metadata.get("fit"),
                    "fingerprint": callback.delta.content.fingerprint.hex(),
                    "path": str(callback.outcome.path),
                }
        told["logged"] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        told["weights"] = [float(param.detach().double().sum()) for param in pl_module.parameters()]
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(told))


def callbacks(folder):
    return [
        DeltaCompressionCallback(dtrain.Dare(keep=0.5), folder / "dare.safetensors", monitor="val_loss", mode="min"),
        DeltaCompressionCallback(dtrain.DareX(keep=0.3, masks=1, search="golden"), monitor="val_loss", mode="min"),
        DeltaCompressionCallback(
            dtrain.SeededSign(keep=0.3),
            folder / "sign.safetensors",
            fit=dtrain.Learn(steps=4, every=2),
            monitor="val_loss",
            mode="min",
        ),
        ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True),
        Tell(folder),
    ]


def run(folder, processes, strategy="auto", epochs=2, **options):
    """Fit in `processes` processes and return what each rank told."""
    trainer = make_trainer(folder, *callbacks(folder), epochs=epochs, devices=processes, strategy=strategy)
    trainer.fit(Pulled(), train_loader(16 // processes), val_loader(), **options)
    return trainer


def told(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    here = Path(sys.argv[1])
    run(here, 2, "ddp", epochs=1)
    run(here, 2, "ddp", epochs=2, ckpt_path=here / "checkpoints" / "last.ckpt")
