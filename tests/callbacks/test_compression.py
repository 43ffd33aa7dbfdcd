"""DeltaCompressionCallback inside Lightning: what it writes, measures and logs."""

from __future__ import annotations

import csv
import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from dtrain.callbacks.trade import Trade
from dtrain.errors import InputError
from tests.callbacks.models import (
    DARE,
    QUIET,
    SEARCH,
    Classifier,
    Memory,
    Net,
    TwoLoaders,
    checkpoints,
    compress,
    fit,
    make_trainer,
    train_loader,
    val_loader,
)

pytestmark = QUIET


class TestZeroArguments:
    def test_writes_measures_and_logs(self, tmp_path, capsys):
        module, callback = Classifier(), DeltaCompressionCallback()
        trainer = fit(module, tmp_path, callback)
        outcome = callback.outcome
        assert (callback.method, callback.fit) == (dtrain.SeededSign(keep=1 / 8), dtrain.Search())
        assert outcome.path == tmp_path / "delta.safetensors"
        assert outcome.path.stat().st_size == outcome.report.file_bytes
        assert set(outcome.scores) == {"base", "finetuned", "compressed"}
        assert all(set(found) == {"val_acc", "val_loss", "val_spread"} for found in outcome.scores.values())
        for name, value in outcome.scores["finetuned"].items():
            assert value == float(trainer.callback_metrics[name])
        assert outcome.drop is None
        printed = capsys.readouterr().out
        assert printed.count("val_acc") == 1
        assert str(outcome.path) in printed

    def test_the_file_is_what_was_measured(self, tmp_path):
        module, callback = Classifier(), compress(method=SEARCH)
        fresh = Classifier()
        fit(module, tmp_path, callback)
        dtrain.load(callback.outcome.path).apply_(fresh)
        found = make_trainer(tmp_path).validate(fresh, val_loader(), verbose=False)[0]
        assert found == callback.outcome.scores["compressed"]
        found = make_trainer(tmp_path).validate(Classifier(), val_loader(), verbose=False)[0]
        assert found["val_loss"] == callback.outcome.scores["base"]["val_loss"]

    def test_the_same_file_as_compress(self, tmp_path):
        module, callback = Classifier(), compress()
        fit(module, tmp_path, callback)
        training = callback.delta.content.metadata["training"]
        assert training == {"epochs": 2, "steps": 6, "optimizers": ["Adam"], "precision": "32-true"}
        dtrain.compress(Classifier(), module, DARE, training=training).save(tmp_path / "other.safetensors")
        assert (tmp_path / "other.safetensors").read_bytes() == callback.outcome.path.read_bytes()

    def test_float_buffers_are_part_of_the_delta(self, tmp_path):
        module, callback = Classifier(), compress()
        fit(module, tmp_path, callback)
        merged = callback.delta.state_dict(Classifier())
        torch.testing.assert_close(
            merged["model.norm.running_mean"], module.model.norm.running_mean, rtol=1e-2, atol=1e-3
        )
        assert merged["model.norm.num_batches_tracked"] == 6

    def test_a_log_folder(self, tmp_path):
        callback = compress()
        trainer = fit(Classifier(), tmp_path, callback, logger=CSVLogger(tmp_path))
        assert callback.outcome.path == Path(trainer.log_dir) / "delta.safetensors"

    def test_runs_of_a_logger_without_log_folder_do_not_share_a_file(self, tmp_path):
        callback = compress()
        fit(Classifier(), tmp_path, callback, logger=Memory())
        assert callback.outcome.path == tmp_path / "memory" / "0" / "delta.safetensors"


class TestScores:
    def test_two_loaders(self, tmp_path):
        callback = compress(monitor="val_acc/dataloader_idx_1", method=SEARCH)
        trainer = fit(TwoLoaders(), tmp_path, callback, val=[val_loader(), val_loader(seed=3)])
        assert "val_loss/dataloader_idx_0" in callback.outcome.scores["base"]
        for name, value in callback.outcome.scores["finetuned"].items():
            assert value == float(trainer.callback_metrics[name])

    def test_loaders_combined_side_by_side(self, tmp_path):
        class SideBySide(Classifier):
            def validation_step(self, batch, batch_idx):
                self.log("val_gap", self(batch["a"][0]).mean() - self(batch["b"][0]).mean())

            def on_validation_epoch_end(self):
                pass

        loaders = pl.utilities.CombinedLoader({"a": val_loader(), "b": val_loader(3)}, "max_size_cycle")
        callback = compress(method=SEARCH)
        trainer = fit(SideBySide(), tmp_path, callback, val=loaders)
        assert callback.outcome.scores["finetuned"] == {"val_gap": float(trainer.callback_metrics["val_gap"])}

    def test_limited_validation(self, tmp_path):
        callback = compress()
        trainer = fit(Classifier(), tmp_path, callback, limit_val_batches=1)
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])

    @pytest.mark.filterwarnings("ignore:You requested to overfit")
    def test_precision_of_the_run(self, tmp_path):
        callback = compress(method=SEARCH)
        trainer = fit(Classifier(), tmp_path, callback, precision="bf16-mixed")
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])

    def test_16_bit_weights(self, tmp_path):
        callback = compress(method=SEARCH)
        trainer = fit(Classifier(), tmp_path, callback, precision="bf16-true")
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])
        assert callback.delta.report().checkpoint_bytes == 2 * 595 + 8

    @pytest.mark.parametrize(
        ("monitor", "mode", "saver", "sign"),
        [
            ("val_acc", None, None, 1),
            ("val_loss", "min", None, -1),
            (None, None, {"monitor": "val_loss", "mode": "min"}, -1),
            ("val_loss", None, {"monitor": "val_loss", "mode": "min"}, -1),
            ("val_acc", None, {"monitor": "val_loss", "mode": "min"}, 1),
        ],
    )
    def test_drop(self, tmp_path, monitor, mode, saver, sign):
        callback = compress(monitor=monitor, mode=mode)
        logger = Memory()
        callbacks = [callback] if saver is None else [callback, checkpoints(tmp_path, **saver)]
        fit(Classifier(), tmp_path, *callbacks, logger=logger)
        outcome = callback.outcome
        name = monitor or saver["monitor"]
        tuned, compressed = (outcome.scores[who][name] for who in ("finetuned", "compressed"))
        assert outcome.monitor == name
        assert outcome.drop == sign * (tuned - compressed)
        step, values = logger.values[-1]
        assert step == 6
        assert values == {
            "dtrain/bytes": outcome.report.file_bytes,
            "dtrain/ratio": outcome.report.ratio,
            **{f"dtrain/metric_{who}": outcome.scores[who][name] for who in ("base", "finetuned", "compressed")},
            "dtrain/metric_drop": outcome.drop,
            **Trade().values(outcome.report.file_bytes, outcome.drop),
        }

    def test_a_training_metric_of_the_checkpoints_does_not_count(self, tmp_path):
        callback = compress()
        fit(Classifier(), tmp_path, callback, checkpoints(tmp_path, monitor="train_loss"))
        assert callback.outcome.monitor is callback.outcome.drop is None

    def test_no_validation_data(self, tmp_path):
        callback = compress(monitor="val_acc")
        with pytest.warns(UserWarning, match="the run has no validation data, so no score is measured"):
            fit(Classifier(), tmp_path, callback, limit_val_batches=0)
        assert callback.outcome.path.exists()
        assert callback.outcome.scores == {}
        assert callback.outcome.drop is None

    def test_no_validation_loop(self, tmp_path):
        class Bare(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = Net()

            configure_optimizers = Classifier.configure_optimizers
            forward = Classifier.forward
            lr = 0.01

            def training_step(self, batch, batch_idx):
                return nn.functional.cross_entropy(self(batch[0]), batch[1])

        callback = compress()
        with pytest.warns(UserWarning, match="no validation data"):
            fit(Bare(), tmp_path, callback, val=())
        assert callback.outcome.path.exists()
        with pytest.raises(InputError, match=r"Bare has none.*q='norm'"):
            fit(Bare(), tmp_path, DeltaCompressionCallback(), val=())


class TestMonitor:
    @pytest.mark.parametrize("monitor", ["acc", "train_loss"])
    @pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}], ids=["run", "dev"])
    def test_missing_metric_ends_the_run_at_the_first_validation(self, tmp_path, monitor, options):
        module = Classifier()
        with pytest.raises(InputError, match=rf"logs val_acc, val_loss, val_spread, but `monitor` is '{monitor}'"):
            fit(module, tmp_path, compress(monitor=monitor), epochs=9, **options)
        assert module.current_epoch == 0

    def test_a_metric_that_is_not_logged_in_the_sanity_check(self, tmp_path):
        class Late(Classifier):
            def on_validation_epoch_end(self):
                super().on_validation_epoch_end()
                if not self.trainer.sanity_checking:
                    self.log("late", 1.0)

        callback = compress(monitor="late")
        fit(Late(), tmp_path, callback)
        assert callback.outcome.drop == 0

    def test_a_metric_that_the_last_validation_does_not_log(self, tmp_path):
        class Early(Classifier):
            def on_validation_epoch_end(self):
                super().on_validation_epoch_end()
                if self.current_epoch == 0:
                    self.log("early", 1.0)

        callback = compress(monitor="early")
        with pytest.warns(UserWarning, match="`monitor` is 'early'"):
            fit(Early(), tmp_path, callback)
        assert callback.outcome.path.exists()
        assert callback.outcome.drop is None

    def test_metric_fit_without_metric(self, tmp_path):
        with pytest.raises(InputError, match=r"fit_on='metric' needs a metric"):
            fit(Classifier(), tmp_path, compress(method=SEARCH, fit_on="metric"))


class TestLoggers:
    def test_all_of_them(self, tmp_path):
        memory, callback = Memory(), compress(monitor="val_acc")
        trainer = fit(Classifier(), tmp_path, callback, logger=[CSVLogger(tmp_path), memory])
        with Path(trainer.log_dir, "metrics.csv").open() as file:
            last = list(csv.DictReader(file))[-1]
        values = memory.values[-1][1]
        assert set(values) == {
            *(f"dtrain/metric_{who}" for who in ("base", "finetuned", "compressed", "drop")),
            "dtrain/bytes",
            "dtrain/feasible",
            "dtrain/objective",
            "dtrain/ratio",
        }
        assert {name: float(last[name]) for name in values} == values

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_wandb(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")
        from lightning.pytorch.loggers import WandbLogger

        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        logger, callback = WandbLogger(save_dir=tmp_path, project="p"), compress(monitor="val_acc")
        try:
            fit(Classifier(), tmp_path, callback, logger=logger)
            summary = dict(logger.experiment.summary)
        finally:
            wandb.finish()
        assert summary["dtrain/metric_drop"] == callback.outcome.drop
        assert summary["dtrain/bytes"] == callback.outcome.report.file_bytes
        assert callback.outcome.path.parent.parent.parent == tmp_path  # project and run


def test_pickles_before_training(tmp_path):
    callback = pickle.loads(pickle.dumps(compress(tmp_path / "delta.safetensors", monitor="val_acc")))  # noqa: S301
    fit(Classifier(), tmp_path, callback)
    assert callback.outcome.path.exists()


def test_the_other_lightning(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = Net()

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("val_loss", nn.functional.cross_entropy(self.model(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    callback = compress(method=SEARCH, monitor="val_loss", mode="min")
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = other.Trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=2, **options)
    trainer.fit(Module(), train_loader(), val_loader())
    assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])
