"""Fine-tune BEiT-3 on pairs of images and statements (NLVR2), and ship the change as one small file.

    python recipes/beit3_nlvr2.py                       # BEiT-3 base on NLVR2 where a GPU, the Hub and its files are
    python recipes/beit3_nlvr2.py --preset offline      # a small BEiT-3 and statements about two handwritten digits
    python recipes/beit3_nlvr2.py --preset hub --data.dataset PATH    # BEiT-3 base on NLVR2, with the files below
    python recipes/beit3_nlvr2.py --preset hub --model.pretrained beit3_large_patch16_224.pth --data.image_size 384
    python recipes/beit3_nlvr2.py --method SeededSign --method.keep 0.1 --fit Learn --fit.steps 50
    python recipes/beit3_nlvr2.py --data.kinds [order]             # only who shows the larger digit
    python recipes/beit3_nlvr2.py --preset hub --data.dataset PATH --evaluate beit3_base_patch16_224_nlvr2.pth

The checkpoints and `beit3.spm` of microsoft/unilm are at github.com/addf400/files/releases/download/beit3; the preset
looks for them, and for the folder `nlvr2`, where it is run. The delta file has their tensor names, and its base is
`checkpoints/dtrain-base-*.safetensors` in the folder of the run. To ship for an official checkpoint, which has heads of
its pre-training besides and is refused as that base, give it as --compress.base too (the table's base then has the
fine-tuned head, as the checkpoint has none), or compress the run against it; an official fine-tune needs no training:

    dtrain compress beit3_base_patch16_224.pth runs/beit3_nlvr2/checkpoints/last.ckpt nlvr2.safetensors
    dtrain compress beit3_base_patch16_224.pth beit3_base_patch16_224_nlvr2.pth nlvr2.safetensors --method SeededSign

`--data.dataset` is `digits`, a Hub data set, or a folder of Parquet files with the columns left_image, right_image,
sentence (or question) and label (or answer); NLVR2's own images need a form (github.com/lil-lab/nlvr).
`--model.pretrained` is `digits` or a file in the original's names. The same settings as YAML: beit3_nlvr2.yaml
"""

import sys
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
from dtrain.errors import InputError
from parts.beit3 import Beit3ForPairs
from parts.beit3_base import load_beit3
from parts.compare import compare
from parts.digit_pairs import PairBatch
from parts.image_pairs import ImagePairs
from parts.probe import probe_states
from parts.recipe import RecipeCLI, open_recipe, run
from parts.sampling import in_two
from parts.training import seed_batch, warmup_then_cosine

PRESETS: dict[str, dict[str, Any]] = {
    "hub": {
        "data.dataset": "./nlvr2",  # files that have to be there, or `auto` is the other preset
        "data.tokenizer": "./beit3.spm",
        "data.image_size": 224,
        "data.workers": 8,
        "data.batch_size": 32,
        "model.pretrained": "./beit3_base_patch16_224.pth",
        "model.drop_path": 0.2,
        "model.lr": 5e-5,
        "trainer.max_steps": 10_000,
        "method": {"class_path": "dtrain.SeededSign", "init_args": {"keep": 0.125, "q": "search"}},
        "compress.embeddings": ["beit3.text_embed.weight"],  # 49 of 221 million numbers, and its words are not new
        "trainer.precision": "bf16-mixed",
    },
    "offline": {
        "data.dataset": "digits",
        "data.kinds": ["shows", "same", "order"],  # parity takes longer to learn than a demonstration may
        "model.pretrained": "digits",
        "model.lr": 2e-3,
        "trainer.max_steps": 1500,
        "data.calibration": 512,
        # A small model has little to spare: signs with learnt scales, as in beit3_image. Task, sizes and method were
        # settled after looks at the validation pairs, which favours them a little.
        "method": {"class_path": "dtrain.SeededSign", "init_args": {"keep": 0.3, "q": "search"}},
        "fit": {"class_path": "dtrain.Learn", "init_args": {"steps": 60}},
    },
}
KEEPS = (0.6, 0.3, 0.1, 0.03)  # points of the picture
LOOKED_AT = {"train": 64, "val": 32, "calibration": 4}  # batches of 64 pairs


class Beit3Pairs(L.LightningModule):
    """BEiT-3 with a fresh head that says whether a statement about two images is true.

    Args:
        pretrained: `digits`, or a file in the names of the original checkpoints.
        image_size: Side of the images; follows the data. The positions of the base's patches are interpolated to it.
        lr: Peak learning rate of AdamW; it warms up over a tenth of the steps and falls as a cosine.
        drop_path: Share of samples that leave out the last layer while training; it grows with the depth.
    """

    def __init__(
        self, pretrained: str = "digits", image_size: int = 8, lr: float = 1e-3, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = load_beit3(pretrained, image_size, num_classes=2, drop_path=drop_path)
        self.val_acc = torchmetrics.Accuracy("binary")
        self.lr = lr

    def forward(self, left: Tensor, right: Tensor, tokens: Tensor, padding: Tensor) -> Tensor:
        return self.model(left, right, tokens, padding)

    def setup(self, stage: str) -> None:
        words, known = len(self.trainer.datamodule.tokenizer), self.model.beit3.config.vocabulary
        if not known - 64 < words <= known:  # both models have a few rows more than their tokenizers have ids
            raise InputError(
                f"the tokenizer has {words} ids, the text embedding {known} rows: they are not of one model. "
                "--data.tokenizer words goes with --model.pretrained digits, beit3.spm with the official checkpoints."
            )

    def on_train_batch_start(self, batch: PairBatch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: PairBatch, _: int) -> Tensor:
        *inputs, labels = self.trainer.datamodule.augmented(batch)
        loss = cross_entropy(self(*inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: PairBatch, _: int) -> None:
        *inputs, labels = batch
        logits = self(*inputs)
        self.val_acc(logits.argmax(-1), labels)
        self.log("val_loss", cross_entropy(logits, labels))
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return warmup_then_cosine(self, self.lr)


def main() -> None:
    links = {"data.image_size": "model.image_size"}
    cli = open_recipe(Beit3Pairs, ImagePairs, PRESETS, monitor="val_acc", links=links)
    callback = cli.train()
    if callback is not None:
        picture(cli, callback)


def picture(cli: RecipeCLI, callback: DeltaCompressionCallback) -> None:
    """Draw what other keep rates would have cost, on a part of the pairs, and control that both modalities count."""
    model, data = cli.model.model, cli.datamodule
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    train, val, calibration = (batches(data, name, most, device) for name, most in LOOKED_AT.items())
    statement, images = (accuracy(model, [of_others(batch, taken) for batch in val]) for taken in ((2, 3), (0, 1)))
    compare(
        model,
        callback,
        callback.read_base(cli.trainer),
        score=lambda: accuracy(model, val),
        probe=lambda: probe(model, train, val),
        inputs=[tuple(inputs) for inputs, _ in labelled(calibration)],
        title=f"{Path(data.dataset).name}: {sum(len(batch[-1]) for batch in val)} pairs",
        keeps=KEEPS,
    )
    sys.stdout.write(
        f"control, fine-tuned: {statement:.4f} with the statements of other pairs, {images:.4f} with their images\n"
    )


def batches(data: ImagePairs, name: str, most: int, device: torch.device) -> list[PairBatch]:
    """Return the first batches of a split, normalised, without augmentation."""
    split = data.split(name)
    loader = DataLoader(split, in_two(len(split), 64), num_workers=data.workers)
    return [data.normalise(tuple(part.to(device) for part in batch)) for batch in islice(loader, most)]


def labelled(batches: list[PairBatch]) -> list[tuple[list[Tensor], Tensor]]:
    """Return batches as inputs and labels."""
    return [(batch[:-1], batch[-1]) for batch in batches]


def of_others(batch: PairBatch, taken: tuple[int, int]) -> PairBatch:
    """Return a batch where every pair has these parts of another pair: a control that has to score like chance."""
    return tuple(part.roll(len(part) // 2 + 1, 0) if place in taken else part for place, part in enumerate(batch))


def probe(base: Beit3ForPairs, train: list[PairBatch], val: list[PairBatch]) -> float:
    """Return the accuracy of a linear model of the base's class tokens, which are what the fresh head gets."""
    answers, labels = probe_states(lambda inputs: base.class_tokens(*inputs), labelled(train), labelled(val))
    return float((answers == labels).double().mean())


@torch.no_grad()
def accuracy(model: nn.Module, pairs: list[PairBatch]) -> float:
    model.eval()
    right = sum(int((model(*inputs).argmax(-1) == labels).sum()) for *inputs, labels in pairs)
    return right / sum(len(batch[-1]) for batch in pairs)


if __name__ == "__main__":
    run(main)
