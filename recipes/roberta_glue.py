"""Fine-tune RoBERTa on a task of GLUE, ship the change as one small file, and see what that costs.

    python recipes/roberta_glue.py                          # RoBERTa-base on SST-2 where there is a GPU and the Hub
    python recipes/roberta_glue.py --preset offline         # a small RoBERTa on English: minutes on two cores
    python recipes/roberta_glue.py --preset hub --data.task mnli --trainer.max_steps 10000
    python recipes/roberta_glue.py --method DareX --method.keep 0.1 --fit null
    python recipes/roberta_glue.py --data.dataset PATH --model.pretrained PATH          # local folders, see below
    python recipes/roberta_glue.py --trainer.logger WandbLogger --trainer.logger.offline true
    python recipes/roberta_glue.py ... --evaluate merged.safetensors     # only score weights, after `dtrain apply`

`--data.dataset` is `english` (made of the standard library's documentation: task word_order; next_sentence is beyond
the small base), a Hub data set such as `nyu-mll/glue`, or a folder of Parquet files in its schema, with a folder per
task or without. The task is what that folder is called, or `--data.task`.
`--model.pretrained` is `english` (pre-trained here by masked words), a Hub model such as `FacebookAI/roberta-base`, or
a local folder of any encoder that transformers can put a head on, BERT's family included.
Everything else: --help. The same settings as YAML: --config recipes/roberta_glue.yaml

The base of `dtrain apply` is `checkpoints/dtrain-base-*.safetensors` in the folder of the run: the encoder by the names
that it has with a head. To ship for a folder of the Hub that has these names, as RoBERTa's, give it as --compress.base.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from dtrain.callbacks import DeltaCompressionCallback
from parts.compare import compare
from parts.encoders import check_length, encode, load_encoder, pooled
from parts.glue import TASKS, answers, task_metrics
from parts.probe import probe_states
from parts.recipe import RecipeCLI, open_recipe, run
from parts.texts import TextData
from parts.training import seed_batch, warmup_then_cosine

PRESETS: dict[str, dict[str, Any]] = {
    "hub": {
        "data.dataset": "nyu-mll/glue",
        "data.revision": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        "model.pretrained": "FacebookAI/roberta-base",
        "model.revision": "e2da8e2f811d1448a5b465c236feacd80ffbac7b",
        "model.lr": 2e-5,
        "trainer.max_steps": 5000,
        "trainer.precision": "bf16-mixed",
        "method": {"class_path": "dtrain.DareX", "init_args": {"keep": 0.01}},
    },
    "offline": {
        "data.dataset": "english",
        "data.calibration": 128,
        "model.pretrained": "english",
        "trainer.max_steps": 500,
        "method": {"class_path": "dtrain.SeededSign", "init_args": {"keep": 0.5}},  # a small model has little to spare
        "fit": {"class_path": "dtrain.Learn", "init_args": {"steps": 60}},
        "compress.fit_on": "logits",
    },
}
LOOKED_AT = {"train": 128, "validation": 64, "calibration": 8}  # batches of 32 texts at most for the picture

Batch = tuple[list[tuple[str, ...]], Tensor]  # the texts, column by column, and the labels


class Encoder(L.LightningModule):
    """A pre-trained encoder with a head for one task.

    Args:
        task: What to tell; follows the data.
        pretrained: `english`, a Hub model such as `FacebookAI/roberta-base`, or a local folder.
        revision: Commit, branch or tag of a Hub model.
        lr: Peak learning rate of AdamW; it warms up over a tenth of the steps and falls as a cosine. None is 1e-3 for
            the small base that is made here, and 5e-5 for any other.
        max_length: Tokens after which a text, or the longer one of a pair, is cut.
    """

    def __init__(
        self,
        task: str = "word_order",
        pretrained: str = "english",
        revision: str = "main",
        lr: float | None = None,
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.task = TASKS[task]
        self.model, self.tokenizer = load_encoder(pretrained, self.task, revision)
        check_length(self.model, max_length)
        self.lr = (1e-3 if pretrained == "english" else 5e-5) if lr is None else lr
        self.max_length = max_length
        self.scores = nn.ModuleList(task_metrics(self.task) for _ in self.task.validation)

    def encode(self, columns: list[tuple[str, ...]]) -> dict[str, Tensor]:
        return encode(self.tokenizer, columns, self.max_length, self.device)

    def forward(self, columns: list[tuple[str, ...]]) -> Tensor:
        return self.model(**self.encode(columns)).logits

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels) if self.task.labels else mse_loss(logits.squeeze(-1), labels)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train_loss", loss, batch_size=len(batch[1]))
        return loss

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        logits = self(batch[0])
        self.scores[dataloader_idx].update(answers(self.task, logits), batch[1])
        if dataloader_idx == 0:
            self.log("val_loss", self.loss(logits, batch[1]), batch_size=len(batch[1]), add_dataloader_idx=False)

    def on_validation_epoch_end(self) -> None:
        for split, metrics in zip(self.task.validation, self.scores, strict=True):
            if next(iter(metrics.values())).update_called:  # a fit looks at one loader
                found = metrics.compute()
                self.log_dict({f"{split.replace('validation', 'val')}_{name}": value for name, value in found.items()})
                if split == self.task.validation[0]:
                    self.log("val_score", found[self.task.metrics[0]], prog_bar=True)
            metrics.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        return warmup_then_cosine(self, self.lr)


def main() -> None:
    cli = open_recipe(Encoder, TextData, PRESETS, monitor="val_score", links={"data.task": "model.task"})
    callback = cli.train()
    if callback is not None:
        picture(cli, callback)


def picture(cli: RecipeCLI, callback: DeltaCompressionCallback) -> None:
    """Draw what other keep rates would have cost, on a part of the texts."""
    module, data, network = cli.model, cli.datamodule, cli.model.model
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    task, split = module.task, module.task.validation[0]
    train, val, held = (
        [(module.encode(texts), labels) for texts, labels in data.some(name, 32, most)]
        for name, most in zip(("train", split, "calibration"), LOOKED_AT.values(), strict=True)
    )
    truth = torch.cat([labels for _, labels in val])
    metric = task_metrics(task)[task.metrics[0]]

    @torch.no_grad()
    def score() -> float:
        found = [answers(task, network(**inputs).logits.float()) for inputs, _ in val]
        return float(metric(torch.cat(found).cpu(), truth))

    def probe() -> float:
        def look(inputs: dict[str, Tensor]) -> Tensor:
            return pooled(network, inputs)

        return float(metric(*probe_states(look, train, val)))

    compare(
        network,
        callback,
        callback.read_base(cli.trainer),
        score=score,
        probe=probe,
        inputs=[inputs for inputs, _ in held],
        title=f"{Path(data.dataset).name}, {task.name}: {len(truth)} texts",
        metric=task.metrics[0],
    )


if __name__ == "__main__":
    run(main)
