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

from typing import Any

from parts.classifier import Classifier, picture
from parts.images import Images
from parts.recipe import open_recipe, run
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


class ViT(Classifier):
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
        super().__init__(load_vit(pretrained, num_classes), num_classes, lr, label_smoothing)
        self.save_hyperparameters()


def main() -> None:
    cli = open_recipe(ViT, Images, PRESETS, monitor="val_acc")
    callback = cli.train()
    if callback is not None:
        picture(cli, callback)


if __name__ == "__main__":
    run(main)
