"""Fine-tune T5 on a task of GLUE, text to text, ship the change as one small file, and see what that costs.

    python recipes/t5_glue.py                              # T5-base on SST-2 where there is a GPU and the Hub
    python recipes/t5_glue.py --preset offline             # a small T5 on English: minutes on two cores
    python recipes/t5_glue.py --preset hub --data.task stsb --model.scoring generate
    python recipes/t5_glue.py --method SeededSign --method.keep 0.03 --fit Learn --compress.fit_on logits
    python recipes/t5_glue.py --data.dataset PATH --model.pretrained PATH        # local folders, see below
    python recipes/t5_glue.py ... --evaluate merged.safetensors     # only score weights, after `dtrain apply`

`--data.dataset` is `english` (tasks word_order and next_sentence), a Hub data set such as `nyu-mll/glue`, or a folder
of Parquet files in its schema. `--model.pretrained` is `english` (pre-trained here), a Hub model such as
`google-t5/t5-base`, or a local folder of a T5, T5 v1.1 or Flan-T5: config.json, model.safetensors, tokenizer.json.
Everything else: --help. The same settings as YAML: --config recipes/t5_glue.yaml

An answer is a text. Validation reads it in two ways: `rank` takes the label whose text is likeliest, in one call of the
model; `generate` lets the model write, and what is no label is wrong. A base that never saw a task ranks by chance; the
first T5 saw GLUE, with these very prompts, in the mixture that it was pre-trained on, so its base score is not that.

The base is the folder of the model, and the file has the names that stand there. It holds the embedding once: in T5 it
is the output layer as well, so the method compresses it, where dtrain leaves the word embeddings of encoders at the
base. The two tables of relative positions are compressed likewise.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from dtrain.callbacks import DeltaCompressionCallback
from parts import t5
from parts.compare import compare
from parts.glue import TASKS, task_metrics
from parts.probe import probe_states
from parts.recipe import RecipeCLI, open_recipe, run
from parts.texts import TextData
from parts.training import seed_batch, warmup_then_cosine

PRESETS: dict[str, dict[str, Any]] = {
    "hub": {
        "data.dataset": "nyu-mll/glue",
        "data.revision": "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c",
        "model.pretrained": "google-t5/t5-base",
        "model.revision": "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
        "model.lr": 1e-4,
        "trainer.max_steps": 2000,
        "trainer.precision": "bf16-mixed",
        "method": {"class_path": "dtrain.DareX", "init_args": {"keep": 0.01}},
    },
    "offline": {
        "data.dataset": "english",
        "model.pretrained": "english",
        "model.lr": 2e-3,
        "trainer.max_steps": 1200,
        "trainer.gradient_clip_val": 1.0,
        # A small model has little to spare: signs on half of the weights with learnt scales, as in roberta_glue, keep
        # 0.67 of 0.82 here, in 12 kB. This was chosen after a look at the validation texts, which favours it; of 0.91
        # on 2,048 training texts, in a run before calibration had documents of its own, the signs kept 0.59, this 0.85.
        "method": {"class_path": "dtrain.DareX", "init_args": {"keep": 0.3}},
        "compress.fit_on": "logits",
        "compress.calibration_batches": 4,
    },
}
LOOKED_AT = {"train": 64, "validation": 32}  # batches of 64 rows at most that the picture is drawn from
KEEPS = (0.5, 0.3, 0.1, 0.03, 0.01)
WAYS = ("rank", "generate")

Batch = tuple[list[tuple[str, ...]], Tensor]  # the texts, column by column, and the labels


class Prompts(TextData):
    """A task of GLUE; rows to fit scales on come with a third item, which says that their labels are ranked only."""

    def calibration_dataloader(self) -> DataLoader:
        def marked(rows: list[tuple[tuple[str, ...], Tensor]]) -> tuple[list[tuple[str, ...]], Tensor, bool]:
            return (*default_collate(rows), True)

        return super().calibration_dataloader(collate_fn=marked)


class T5(L.LightningModule):
    """A pre-trained T5 that answers with a text.

    Args:
        task: What to answer; follows the data.
        pretrained: `english`, a Hub model such as `google-t5/t5-base`, or a local folder with config.json,
            model.safetensors and tokenizer.json.
        revision: Revision of a Hub model.
        lr: Peak learning rate of AdamW; it warms up over a tenth of the steps and falls as a cosine.
        scoring: Which answers `val_score` is made of: `rank` takes the likeliest label, `generate` lets the model
            write. Validation logs both. Scales that are fitted to it (--compress.fit_on metric) are fitted to `rank`
            either way: that is fast.
        max_length: Tokens after which a prompt is cut.
    """

    def __init__(
        self,
        task: str = "word_order",
        pretrained: str = "english",
        revision: str = "main",
        lr: float = 1e-3,
        scoring: Literal["rank", "generate"] = "rank",
        max_length: int = 128,
    ) -> None:
        super().__init__()
        self.task = TASKS[task]
        self.folder = t5.find_folder(pretrained, revision)  # the base: the delta file gets its names
        self.model, self.tokenizer = t5.load_t5(self.folder)
        self.labels = t5.encode_labels(self.tokenizer, t5.label_texts(self.task))
        self.lr, self.scoring, self.max_length = lr, scoring, max_length
        names = [f"{split}_{way}" for split in self.task.validation for way in WAYS]
        self.scores = nn.ModuleDict({name: task_metrics(self.task) for name in names})

    def encode(self, columns: list[tuple[str, ...]]) -> dict[str, Tensor]:
        prompts = [t5.prompt(self.task, row) for row in zip(*columns, strict=True)]
        return t5.encode(self.tokenizer, prompts, self.max_length, self.device)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return t5.log_likelihoods(self.model, inputs, self.labels)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        seed_batch(self, batch_idx)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        target = self.labels.target(t5.label_ids(self.task, batch[1])).to(self.device)
        loss = self.model(**self.encode(batch[0]), labels=target).loss
        self.log("train_loss", loss, batch_size=len(target))
        return loss

    def validation_step(self, batch: Batch, _: int, dataloader_idx: int = 0) -> None:
        columns, labels, *only_ranked = batch
        inputs, split = self.encode(columns), self.task.validation[dataloader_idx]
        self.scores[f"{split}_rank"].update(t5.choose(self.task, self(inputs)), labels)
        if not only_ranked:
            texts = t5.generate(self.model, self.tokenizer, inputs, self.labels.longest)
            self.scores[f"{split}_generate"].update(t5.read_answers(self.task, texts, labels), labels)

    def on_validation_epoch_end(self) -> None:
        first = self.task.metrics[0]
        scored = {name: metrics for name, metrics in self.scores.items() if metrics[first].update_called}
        values = {f"{name}_{metric}": value for name in scored for metric, value in scored[name].compute().items()}
        self.log_dict({name.replace("validation", "val"): value for name, value in values.items()})
        ways = [f"{self.task.validation[0]}_{way}_{first}" for way in (self.scoring, "rank")]
        self.log("val_score", next(values[way] for way in ways if way in values), prog_bar=True)  # of fits, the rank
        for metrics in scored.values():
            metrics.reset()

    def configure_optimizers(self) -> dict[str, Any]:
        return warmup_then_cosine(self, self.lr)


def main() -> None:
    links = {"data.task": "model.task", "model.folder": "compress.base"}
    cli = open_recipe(T5, Prompts, PRESETS, monitor="val_score", links=links)
    if cli.model.scoring == "generate" and cli.config.compress.fit_on == "metric":
        sys.stderr.write("fit: scales are fitted to ranked labels; what the model writes is only scored\n")
    callback = cli.train()
    if callback is not None:
        picture(cli, callback)


def picture(cli: RecipeCLI, callback: DeltaCompressionCallback) -> None:
    """Draw what other keep rates would have cost, on a part of the rows, with labels ranked: that is fast."""
    module, data, network = cli.model, cli.datamodule, cli.model.model
    module.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    task, split = module.task, module.task.validation[0]
    looked_at = (("train", LOOKED_AT["train"]), (split, LOOKED_AT["validation"]))
    train, val = (
        [(module.encode(texts), labels) for texts, labels in data.some(name, 64, most)] for name, most in looked_at
    )
    truth = torch.cat([labels for _, labels in val])

    @torch.no_grad()
    def score() -> float:
        return t5.score(task, torch.cat([t5.choose(task, module(inputs)) for inputs, _ in val]).cpu(), truth)

    def probe() -> float:
        return t5.score(task, *probe_states(partial(t5.mean_states, network), train, val))

    inputs = [module.encode(texts) for texts, _ in data.some("calibration", 32, 4)]
    compare(
        network,
        callback,
        callback.read_base(cli.trainer),
        score=score,
        probe=probe,
        inputs=[t5.forward_arguments(network, batch, module.labels) for batch in inputs],
        title=f"{Path(data.dataset).name}, {task.name}: {len(truth)} texts, labels ranked",
        metric=task.metrics[0],
        keeps=KEEPS,
    )


if __name__ == "__main__":
    run(main)
