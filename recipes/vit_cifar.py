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

from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dtrain.callbacks import DeltaCompressionCallback
from parts.compare import compare
from parts.images import Images
from parts.probe import probe_accuracy
from parts.recipe import RecipeCLI, open_recipe, run
from parts.training import seed_batch, warmup_then_cosine
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
LOOKED_AT = {"train": 20, "val": 8, "calibration": 1}  # batches of 256 images


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
        seed_batch(self, batch_idx)

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
        return warmup_then_cosine(self, self.lr)


def main() -> None:
    cli = open_recipe(ViT, Images, PRESETS, monitor="val_acc")
    callback = cli.train()
    if callback is not None:
        picture(cli, callback)


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
    run(main)
