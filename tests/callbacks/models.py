"""Tiny modules, data and trainers that the tests of the callbacks share."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.callbacks import DeltaCompressionCallback

DARE = dtrain.Dare(keep=0.5)  # needs no data
#: What Lightning says of every short run, and what is no concern of these tests.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

SEARCH = dtrain.DareX(keep=0.5, masks=1, search="golden")
CLASSES = 3
FEATURES = 12


class Net(nn.Sequential):
    """Two matrices, a norm with float buffers and dropout, and a head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(FEATURES, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.inner = nn.Linear(16, 16)
        self.act = nn.Tanh()
        self.head = nn.Linear(16, CLASSES)


class Classifier(pl.LightningModule):
    """Logs a metric object, a plain value and one at the end of the epoch, as a user would."""

    def __init__(self, lr=0.01, **metric):
        super().__init__()
        torch.manual_seed(0)
        self.model = Net()
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=CLASSES, **metric)
        self.train_acc = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.lr = lr
        self.outputs = []

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        # A resumed run shall equal an unbroken one. Not in on_train_epoch_start: a loader draws its seed before that
        # hook in the first epoch of a fit, and after it in the others.
        torch.manual_seed(1000 * self.current_epoch + batch_idx)
        x, y = batch
        logits = self(x)
        self.train_acc(logits, y)
        self.log("train_acc", self.train_acc)
        loss = cross_entropy(logits, y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        logits = self(x)
        self.val_acc(logits, y)
        self.outputs.append(logits)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", cross_entropy(logits, y))

    def on_validation_epoch_end(self):
        self.log("val_spread", torch.cat(self.outputs).std())
        self.outputs.clear()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=self.lr)


class TwoLoaders(Classifier):
    """Each validation loader has its own metric object, as Lightning wants it."""

    def __init__(self):
        super().__init__()
        self.accs = nn.ModuleList(torchmetrics.Accuracy("multiclass", num_classes=CLASSES) for _ in range(2))

    def validation_step(self, batch, batch_idx, dataloader_idx):
        x, y = batch
        logits = self(x)
        acc = self.accs[dataloader_idx]
        acc(logits, y)
        self.outputs.append(logits)
        self.log("val_acc", acc)
        self.log("val_loss", cross_entropy(logits, y))


class Crash(Callback):
    """Breaks the run at the start of one epoch."""

    def __init__(self, epoch, error=RuntimeError):
        self.epoch, self.error = epoch, error

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise self.error("crash")


class Recorder(Callback):
    """Notes which hooks of the run's callbacks are called."""

    def __init__(self):
        self.calls = []

    def __getattribute__(self, name):
        if name.startswith(("on_", "setup", "teardown")):
            calls = object.__getattribute__(self, "calls")

            def hook(trainer, module, *_, **options):
                calls.append((name, options.get("stage", "")))

            return hook
        return object.__getattribute__(self, name)


def dataset(rows=48, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, FEATURES, generator=generator)
    return TensorDataset(x, (x[:, :CLASSES] + 0.1 * x[:, CLASSES : 2 * CLASSES]).argmax(1))


def train_loader(batch_size=16, **options):
    return DataLoader(dataset(), batch_size=batch_size, **options)


def val_loader(seed=2, rows=40):
    return DataLoader(dataset(rows, seed), batch_size=16)


def make_trainer(folder, *callbacks, epochs=2, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **{**defaults, **options})


def fit(module, folder, *callbacks, ckpt_path=None, train=None, val=None, **options):
    """Train for two epochs and return the trainer. `val=()` means no validation data."""
    trainer = make_trainer(folder, *callbacks, **options)
    val = val_loader() if val is None else val
    trainer.fit(module, train_loader() if train is None else train, val if val != () else None, ckpt_path=ckpt_path)
    return trainer


def state(module):
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(one, other):
    """Whether two state dicts agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def compress(path=None, method=DARE, **options):
    return DeltaCompressionCallback(method, path, **options)


def checkpoints(folder, **options):
    return ModelCheckpoint(dirpath=folder, **options)


class Memory(Logger):
    """A logger that keeps what it is given."""

    name, version = "memory", "0"

    def __init__(self):
        super().__init__()
        self.values = []

    def log_metrics(self, metrics, step=None):
        self.values.append((step, dict(metrics)))

    def log_hyperparams(self, *_, **__):
        pass
