"""Fine-tune a ViT with AdamR, ship the change as one small file, and see what that costs.

    python recipes/vit_cifar.py                              # ViT-B/16 on CIFAR-10 where there is a GPU and the Hub
    python recipes/vit_cifar.py --preset offline             # a small ViT on handwritten digits: minutes on two cores
    python recipes/vit_cifar.py --method DareX --method.keep 0.03 --adamr.strength 0 --trainer.max_steps 200
    python recipes/vit_cifar.py --method SeededSign --fit Learn --fit.steps 50       # scales learnt after encoding
    python recipes/vit_cifar.py --method Dbms --method.host SeededSign --compress.fit_on logits
    python recipes/vit_cifar.py --data.dataset PATH --model.pretrained PATH        # local folders, see below
    python recipes/vit_cifar.py --trainer.logger WandbLogger --trainer.logger.offline true
    python recipes/vit_cifar.py ... --evaluate merged.safetensors     # only score weights, after `dtrain apply`

`--data.dataset` is `digits`, a Hub data set or a folder of Parquet files in the Hub's schema (columns img, label).
`--model.pretrained` is `digits`, a timm model name, or a folder with `config.json` and `model.safetensors`.
Everything else: --help. The same settings as YAML: --config recipes/vit_cifar.yaml
"""

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dtrain
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback
from parts.images import Images
from parts.picture import accuracy_against_bytes, accuracy_table
from parts.presets import choose_preset
from parts.probe import probe_accuracy
from parts.vision_models import load_vit

PRESETS: dict[str, dict[str, Any]] = {
    "hub": {
        "data.dataset": "uoft-cs/cifar10",
        "data.image_size": 224,
        "data.mean": [0.5, 0.5, 0.5],  # what this ViT was pre-trained with
        "data.std": [0.5, 0.5, 0.5],
        "model.pretrained": "vit_base_patch16_224.augreg2_in21k_ft_in1k",  # the full tag: timm's default may move
        "model.lr": 3e-5,
        "trainer.max_steps": 2000,
        "method": {"class_path": "dtrain.DareX", "init_args": {"keep": 0.01}},
        "trainer.precision": "bf16-mixed",
    },
    "offline": {
        "data.dataset": "digits",
        "data.classes": [1, 3, 5, 7, 9],  # the base has seen the even ones only
        "model.pretrained": "digits",
        "model.lr": 1e-3,
        "trainer.max_steps": 400,
        "method": {"class_path": "dtrain.DareX", "init_args": {"keep": 0.1}},  # a small model has little to spare
    },
}
KEEPS = (0.3, 0.1, 0.03, 0.01, 0.003)  # points of the picture
LOOKED_AT = {"train": 20, "val": 8, "calibration": 1}  # batches of 256 images: a picture is a matter of minutes


class ViT(L.LightningModule):
    """A vision transformer with a fresh head.

    Args:
        pretrained: `digits`, a timm model name, or a folder with `config.json` and `model.safetensors`.
        num_classes: Classes of the fresh head; follows the data.
        lr: Peak learning rate of AdamW; it warms up over a tenth of the steps and falls as a cosine.
        label_smoothing: Share of the label that goes to all classes.
    """

    def __init__(
        self, pretrained: str = "digits", num_classes: int = 10, lr: float = 3e-4, label_smoothing: float = 0.1
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = load_vit(pretrained, num_classes)
        self.loss = nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.val_acc = torchmetrics.Accuracy("multiclass", num_classes=num_classes)
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    def on_train_batch_start(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        # Augmentation and dropout follow from seed, epoch and batch alone, so a resumed run equals an unbroken one.
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(seed + 1_000_003 * (1 + self.current_epoch) + batch_idx)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = self.trainer.datamodule.augmented(batch)
        loss = self.loss(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        logits = self(batch[0])
        self.val_acc(logits, batch[1])
        self.log("val_loss", cross_entropy(logits, batch[1]))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        # Weight decay pulls to zero, AdamR to the base: one of them is enough.
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class RecipeCLI(LightningCLI):
    """LightningCLI with the preset's values as defaults and the two callbacks of dtrain as flags."""

    preset = "offline"

    def add_arguments_to_parser(self, parser: Any) -> None:
        parser.add_argument(
            "--preset", type=str, default=self.preset, help="auto (what is there decides), hub or offline"
        )
        parser.add_argument(
            "--method", type=dtrain.Method, default={"class_path": "dtrain.DareX", "init_args": {"keep": 0.01}}
        )
        parser.add_argument("--fit", type=dtrain.Fit | None, default=None, help="how scales are found after encoding")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        parser.add_argument("--evaluate", type=str | None, default=None, help="score these weights and stop")
        parser.add_lightning_class_args(AdamRCallback, "adamr")
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("method", "compress.method", apply_on="instantiate")
        parser.link_arguments("fit", "compress.fit", apply_on="instantiate")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.set_defaults(
            {
                "adamr.strength": 1e-3,
                "compress.path": "runs/vit_cifar/delta.safetensors",
                "compress.monitor": "val_acc",
                "compress.module": "model",
                "checkpoint.monitor": "val_acc",
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.dirpath": "runs/vit_cifar/checkpoints",
                "trainer.default_root_dir": "runs/vit_cifar",
                "trainer.log_every_n_steps": 5,
                "trainer.max_epochs": 1000,  # the steps decide
                **PRESETS[self.preset],
            }
        )
        parser.set_defaults({"seed_everything": 0})


def main() -> None:
    RecipeCLI.preset, why = choose_preset(sys.argv[1:])
    sys.stderr.write(f"preset: {RecipeCLI.preset} ({why})\n")  # standard output stays clean for --print_config
    cli = RecipeCLI(ViT, Images, run=False, save_config_kwargs={"overwrite": True}, seed_everything_default=0)
    if cli.config.evaluate is not None:
        weights = dtrain.read_weights(cli.config.evaluate)
        cli.model.model.load_state_dict(weights.tensors)
        cli.trainer.validate(cli.model, cli.datamodule)
        return
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
    callback = next(c for c in cli.trainer.callbacks if isinstance(c, DeltaCompressionCallback))
    if cli.trainer.is_global_zero and callback.outcome is not None:
        base = callback.read_base(cli.trainer)
        picture(cli.model.model, cli.datamodule, callback, base)


def picture(model: nn.Module, data: Images, callback: DeltaCompressionCallback, base: dtrain.Weights) -> None:
    """Compress once more at a few keep rates and draw accuracy against bytes, with what to compare it to."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train, val, calibration = (batches(data, name, most, device) for name, most in LOOKED_AT.items())
    inputs = [(part,) for images, _ in calibration for part in images.chunk(4)]  # some to learn from, some to stop by
    tuned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lines = {"fine-tuned": accuracy(model, val)}
    points: dict[str, list[tuple[int, float]]] = {}
    methods = {"Dare": (dtrain.Dare(), None), type(callback.method).__name__: (callback.method, callback.fit)}
    drawn = {name: (method, fit) for name, (method, fit) in methods.items() if can_keep(method)}
    for keep in KEEPS:
        for name, (method, fit) in drawn.items():
            compressed = dtrain.compress(
                base,
                tuned,
                at_keep(method, keep),
                fit=fit,
                objective=dtrain.HiddenChange(model, inputs),
                calibration=dtrain.Calibration(model, inputs),
                rules=callback.rules,
                shared=callback.shared,
            )
            model.load_state_dict(compressed.state_dict(base))
            points.setdefault(name, []).append((compressed.file_bytes(), accuracy(model, val)))
            model.load_state_dict(tuned)
    model.load_state_dict(base.tensors)
    lines |= {"linear probe": probe_accuracy(model, train, val), "base": accuracy(model, val)}
    model.load_state_dict(tuned)
    title = f"{Path(data.dataset).name}: accuracy on {sum(len(labels) for _, labels in val)} images, bytes on disk"
    path = callback.outcome.path.with_name("accuracy_against_bytes.png")
    accuracy_against_bytes(points, lines, path, title)
    Console().print(
        accuracy_table(dict(zip(KEEPS, zip(*points.values(), strict=True), strict=True)), points, lines, title)
    )
    sys.stdout.write(f"picture: {path}\n")


def can_keep(method: dtrain.Method) -> bool:
    """Return whether a method, or the one that it hosts, has a keep rate."""
    return hasattr(getattr(method, "host", method), "keep")


def at_keep(method: dtrain.Method, keep: float) -> dtrain.Method:
    """Return a method at another keep rate."""
    host = getattr(method, "host", None)
    return replace(method, keep=keep) if host is None else replace(method, host=replace(host, keep=keep))


def batches(data: Images, name: str, most: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the first batches of a split, normalised, without augmentation."""
    images, labels = (part[: 256 * most].to(device) for part in data.split(name))
    return [data.normalise(pair) for pair in zip(images.split(256), labels.split(256), strict=True)]


@torch.no_grad()
def accuracy(model: nn.Module, split: list[tuple[Tensor, Tensor]]) -> float:
    model.eval()
    right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in split)
    return right / sum(len(labels) for _, labels in split)


if __name__ == "__main__":
    try:
        main()
    except dtrain.DtrainError as error:
        sys.exit(f"vit_cifar: {error}")
