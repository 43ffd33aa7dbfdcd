"""The command line that every recipe has: LightningCLI, two presets, a method, a fit and the callbacks of dtrain."""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from torch import nn

import dtrain
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback, compress_finished
from dtrain.callbacks.outcome import run_folder
from dtrain.callbacks.weights_and_biases import check_installed, check_wandb
from parts.presets import choose_preset, named_class
from parts.training import OrderOfEpoch, ValidateAtLast

Presets = Mapping[str, Mapping[str, Any]]


class LogConfig(SaveConfigCallback):
    """Keeps the whole configuration beside the run, and gives it to the loggers by the names of the command line."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder = run_folder(trainer)  # every process takes part, which they do not in `save_config`
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if self.config.evaluate is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            name = self.config_filename if self.config.compress_only is None else "compress_only.yaml"
            self.parser.save(self.config, str(self.folder / name), skip_none=False, overwrite=True, multifile=False)
        flat = {name: plain(value) for name, value in vars(self.config.as_flat()).items() if name != "config"}
        for logger in trainer.loggers:
            logger.log_hyperparams(flat)


def plain(value: Any) -> Any:
    """Return what every logger can show."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


class RecipeCLI(LightningCLI):
    """LightningCLI with the values of a preset as defaults, and the two callbacks of dtrain as flags.

    Args:
        model: Keeps the network as `self.model`: its names are those of the delta file.
        data: May have a property `num_classes`, which the model's argument of that name follows.
        presets: Values by dotted name, for "hub" and "offline".
        monitor: Metric of the validation that decides which checkpoint is best; more of it is better.
        links: Further properties of the data that arguments of the model follow.
    """

    def __init__(
        self,
        model: type[L.LightningModule],
        data: type[L.LightningDataModule],
        presets: Presets,
        monitor: str,
        links: Mapping[str, str],
    ) -> None:
        self.name = Path(sys.argv[0]).stem
        self.preset, why = choose_preset(sys.argv[1:], presets["hub"])
        sys.stderr.write(f"preset: {self.preset} ({why})\n")  # standard output stays clean for --print_config
        self.values = {**presets[self.preset]}
        for argument in ("method", "fit"):
            # A class that is named takes no argument from the preset's: jsonargparse would hand over those of one name.
            if named := named_class(sys.argv[1:], argument):
                name = named.removeprefix("dtrain.")
                self.values[argument] = {"class_path": f"dtrain.{name}"} if hasattr(dtrain, name) else None
        self.monitor = monitor
        follows = hasattr(data, "num_classes") and "num_classes" in inspect.signature(model).parameters
        self.links = {**({"data.num_classes": "model.num_classes"} if follows else {}), **links}
        super().__init__(
            model,
            data,
            trainer_defaults={"callbacks": [OrderOfEpoch(), ValidateAtLast()]},
            save_config_callback=LogConfig,
            save_config_kwargs={"save_to_log_dir": False},  # which all runs of a WandbLogger share
            seed_everything_default=0,
            run=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        folder = f"runs/{self.name}"
        parser.add_argument(
            "--preset", type=str, default=self.preset, help="auto (what is there decides), hub or offline"
        )
        parser.add_argument("--method", type=dtrain.Method, default=None, help="how the delta is compressed")
        parser.add_argument("--fit", type=dtrain.Fit | None, default=None, help="how scales are found after encoding")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to resume from")
        parser.add_argument("--evaluate", type=str | None, default=None, help="score these weights and stop")
        parser.add_argument(
            "--compress_only",
            type=str | None,
            default=None,
            help="compress a finished run (its last .ckpt) or fine-tuned weights (with --compress.base), and stop",
        )
        parser.add_argument("--compare", type=bool, default=True, help="compress at other keep rates as well, and draw")
        parser.add_lightning_class_args(AdamRCallback, "adamr")
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("method", "compress.method", apply_on="instantiate")
        parser.link_arguments("fit", "compress.fit", apply_on="instantiate")
        for source, target in self.links.items():
            parser.link_arguments(source, target, apply_on="instantiate")
        parser.set_defaults(
            {
                "seed_everything": 0,
                "adamr.strength": 1e-3,
                "compress.path": f"{folder}/delta.safetensors",
                "compress.monitor": self.monitor,
                "compress.module": "model",
                "checkpoint.monitor": self.monitor,
                "checkpoint.mode": "max",
                "checkpoint.save_last": True,
                "checkpoint.dirpath": f"{folder}/checkpoints",
                "trainer.default_root_dir": folder,
                "trainer.log_every_n_steps": 5,
                "trainer.max_epochs": 1000,  # the steps decide
                **self.values,
            }
        )

    def before_instantiate_classes(self) -> None:
        """Say now, and in a sentence, what would come late or as a list of all that a logger may be."""
        if "WandbLogger" in str(self.config.trainer.logger):
            check_installed()
        for argument in ("ckpt_path", "compress_only"):
            check_checkpoint(f"--{argument}", self.config[argument])

    def train(self) -> DeltaCompressionCallback | None:
        """Fine-tune, or resume, and compress; with `--compress_only` only that; with `--evaluate` only score weights.

        Returns:
            The callback with its `outcome`, on the process that wrote the file; None if there is nothing to compare.
        """
        check_wandb(self.trainer)
        if self.config.evaluate is not None:
            load(self.model.model, self.config.evaluate)
            self.trainer.validate(self.model, self.datamodule)
            return None
        if self.config.compress_only is not None:
            self.compress(self.config.compress_only)
            return None
        self.trainer.fit(self.model, self.datamodule, ckpt_path=self.config.ckpt_path)
        saver = self.trainer.checkpoint_callback
        if isinstance(saver, ModelCheckpoint) and saver.save_last:  # Lightning's own is only as new as the best one
            self.trainer.save_checkpoint(Path(saver.dirpath, "last.ckpt"), weights_only=False)
        callback = next(c for c in self.trainer.callbacks if isinstance(c, DeltaCompressionCallback))
        written = self.trainer.is_global_zero and callback.outcome is not None
        return callback if written and self.config.compare else None

    def compress(self, finished: str) -> None:
        """Compress what was fine-tuned before, with the method, the rules and the fit of this command line."""
        is_run = Path(finished).suffix == ".ckpt"
        if not is_run:
            load(self.model.model, finished)
        compress_finished(self.trainer, self.model, finished if is_run else None, datamodule=self.datamodule)


def open_recipe(
    model: type[L.LightningModule],
    data: type[L.LightningDataModule],
    presets: Presets,
    *,
    monitor: str,
    links: Mapping[str, str] | None = None,
) -> RecipeCLI:
    """Read the command line and make model, data and trainer; see `RecipeCLI` for the arguments."""
    return RecipeCLI(model, data, presets, monitor, links or {})


def check_checkpoint(argument: str, path: str | None) -> None:
    """Raise an InputError if the file is not there, or is no checkpoint though its name says so."""
    if path is None or path in ("last", "best"):  # Lightning finds these two
        return
    if not Path(path).exists():
        raise dtrain.InputError(f"{argument}: there is no {path}. Give a checkpoint in the folder of a run.")
    if Path(path).suffix == ".ckpt" and not is_zipfile(path):
        raise dtrain.InputError(f"{argument}: {path} is no checkpoint, or only a part of one. Give an earlier one.")


@torch.no_grad()
def load(module: nn.Module, path: str) -> None:
    """Copy the weights of a file into `module`: all of them, and no others.

    Raises:
        InputError: If a tensor is missing, of another shape, or not the module's.
    """
    own, given = dtrain.read_weights(module), dtrain.read_weights(path)
    for name, tensor in own.tensors.items():
        # A file holds a tied tensor once, by any of its names.
        names = [name, *(alias for alias, first in own.aliases.items() if first == name)]
        found = next((held for each in names if (held := given.get(each)) is not None), None)
        if found is None or found.shape != tensor.shape:
            what = "no such tensor" if found is None else f"the shape {list(found.shape)}"
            raise dtrain.InputError(f"{path}: the model has {name} of {list(tensor.shape)}, the file has {what}.")
        tensor.copy_(found)
    if extra := [name for name in given.tensors if own.get(name) is None]:
        raise dtrain.InputError(f"{path}: the model has no tensor {extra[0]!r}.")


def run(main: Callable[[], None]) -> None:
    """Run a recipe; what was wrong with its input is one sentence on standard error."""
    try:
        main()
    except dtrain.DtrainError as error:
        sys.exit(f"{Path(sys.argv[0]).stem}: {sentence(error)}")


def sentence(error: Exception) -> str:
    """Return what an error says; a process of a data loader has put its traceback before that."""
    says = str(error)
    return says.rpartition(f"{type(error).__name__}: ")[2].strip() if "in DataLoader worker process" in says else says
