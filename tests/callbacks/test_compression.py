"""DeltaCompressionCallback inside Lightning: what it writes, measures and logs, and what it leaves alone."""

from __future__ import annotations

import csv
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import Logger
from torch import nn
from torch.utils.data import DataLoader

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from dtrain.errors import DtrainError, InputError
from tests.callbacks.models import (
    CLASSES,
    FEATURES,
    Classifier,
    Crash,
    Net,
    Recorder,
    TwoLoaders,
    dataset,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

DARE = dtrain.Dare(keep=0.5)  # needs no data
SEARCH = dtrain.DareX(keep=0.5, masks=1, search="golden")


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


class TestZeroArguments:
    def test_writes_measures_and_logs(self, tmp_path, capsys):
        module, callback = Classifier(), DeltaCompressionCallback()
        trainer = fit(module, tmp_path, callback)
        outcome = callback.outcome
        assert callback.method == dtrain.DareX()
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


class TestFit:
    """What the search is fitted on."""

    class Calibrated(Classifier):
        asked = 0

        def calibration_dataloader(self):
            self.asked += 1
            return DataLoader(dataset(rows=24, seed=7), batch_size=8)

    class Data(pl.LightningDataModule):
        def train_dataloader(self):
            return train_loader()

        def val_dataloader(self):
            return val_loader()

        def calibration_dataloader(self):
            return DataLoader(dataset(rows=8, seed=7), batch_size=8)

    def objective(self, callback):
        return callback.delta.content.metadata["fit"]["objective"]

    def test_hidden(self, tmp_path):
        callback = compress(method=SEARCH)
        fit(Classifier(), tmp_path, callback)
        assert self.objective(callback) == "hidden change"

    def test_metric(self, tmp_path):
        callback = compress(method=SEARCH, fit_on="metric", monitor="val_loss", mode="min")
        fit(Classifier(), tmp_path, callback)
        assert self.objective(callback) == "val_loss on training batches"
        fitted = callback.delta.content.metadata["fit"]
        assert fitted["loss"] <= fitted["loss_at_dare"]

    def test_the_metric_is_that_of_training_data(self, tmp_path):
        module = Classifier()
        callback = compress(method=SEARCH, fit_on="metric", monitor="val_loss", mode="min", calibration_batches=2)
        fit(module, tmp_path, callback)
        fresh = Classifier()
        callback.delta.apply_(fresh)
        trainer = make_trainer(tmp_path, limit_val_batches=2)
        order = torch.randperm(
            len(dataset()), generator=torch.Generator().manual_seed(0)
        ).tolist()  # shuffled, but fixed
        loader = torch.utils.data.DataLoader(torch.utils.data.Subset(dataset(), order), train_loader().batch_size)
        found = trainer.validate(fresh, loader, verbose=False)[0]["val_loss"]
        assert found == pytest.approx(callback.delta.content.metadata["fit"]["loss"], rel=1e-6)

    def test_own_inputs_of_the_module(self, tmp_path):
        module, callback = self.Calibrated(), compress(method=SEARCH)
        fit(module, tmp_path, callback)
        plain = compress(method=SEARCH)
        fit(Classifier(), tmp_path, plain)
        assert module.asked == 1
        assert callback.delta.content.metadata["fit"]["loss"] != plain.delta.content.metadata["fit"]["loss"]

    def test_own_inputs_of_the_data_module(self, tmp_path):
        module, callback = self.Calibrated(), compress(method=SEARCH)
        make_trainer(tmp_path, callback).fit(module, self.Data())
        assert callback.outcome.path.exists()
        assert module.asked == 0

    def test_batches_made_by_the_data_set(self, tmp_path):
        class Batches(torch.utils.data.Dataset):
            def __len__(self):
                return 3

            def __getitem__(self, index):
                return dataset()[16 * index : 16 * index + 16]

        callback = compress(method=SEARCH)
        fit(Classifier(), tmp_path, callback, train=DataLoader(Batches(), batch_size=None))
        assert callback.outcome.path.exists()

    def test_a_stream(self, tmp_path):
        class Stream(torch.utils.data.IterableDataset):
            def __iter__(self):
                return iter(dataset())

        callback = compress(method=SEARCH)
        fit(Classifier(), tmp_path, callback, train=DataLoader(Stream(), batch_size=16))
        assert callback.outcome.path.exists()

    @pytest.mark.parametrize("make", [lambda: {"a": train_loader()}, lambda: [train_loader()]], ids=["dict", "list"])
    def test_several_training_loaders_are_refused_before_the_first_step(self, tmp_path, make):
        module = Classifier()
        before = state(module)
        with pytest.raises(InputError, match=r"is a (dict|list), not one DataLoader.*calibration_dataloader\(\)"):
            fit(module, tmp_path, compress(method=SEARCH), train=make())
        assert same(state(module), before)

    def test_no_linear_layer(self, tmp_path):
        class Convolutional(Classifier):
            def __init__(self):
                super().__init__()
                self.model = nn.Sequential(
                    nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, CLASSES, FEATURES), nn.Flatten()
                )

        with pytest.raises(InputError, match=r"no linear layer.*fit_on='metric'"):
            fit(Convolutional(), tmp_path, compress(method=SEARCH))

    def test_random_inputs_are_the_same_in_every_evaluation(self, tmp_path):
        class Noisy(Classifier):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch[0] + torch.randn_like(batch[0]), batch[1]

        callback = compress(method=dtrain.DareX(keep=1.0, q=1.0))
        fit(Noisy(), tmp_path, callback)
        scores = callback.outcome.scores
        assert scores["compressed"]["val_loss"] == pytest.approx(scores["finetuned"]["val_loss"], rel=1e-3)


class TestUntouched:
    """The run with the callback is the run without it."""

    def run(self, folder, *callbacks, module=None, **options):
        torch.manual_seed(0)
        module = module or Classifier()
        saver = checkpoints(folder / "checkpoints", monitor="val_acc", mode="max", save_last=True)
        logger = CSVLogger(folder, name="", version="")
        trainer = fit(module, folder, *callbacks, saver, logger=logger, epochs=3, **options)
        return module, trainer, torch.get_rng_state()

    def test_bit_for_bit(self, tmp_path):
        plain, without, rng_without = self.run(tmp_path / "a")
        module, trainer, rng = self.run(tmp_path / "b", compress(method=SEARCH))
        assert same(state(module), state(plain))
        assert torch.equal(rng, rng_without)
        assert same(trainer.callback_metrics, without.callback_metrics)
        assert same(trainer.logged_metrics, without.logged_metrics)
        assert trainer.progress_bar_metrics == without.progress_bar_metrics
        for one, other in zip(trainer.optimizers[0].state.values(), without.optimizers[0].state.values(), strict=True):
            assert same(one, other)
        for one, other in zip(module.parameters(), plain.parameters(), strict=True):
            assert one.grad is other.grad is None or torch.equal(one.grad, other.grad)

    def test_checkpoints(self, tmp_path):
        self.run(tmp_path / "a")
        self.run(tmp_path / "b", compress(method=SEARCH))
        names = [sorted(path.name for path in (tmp_path / run / "checkpoints").glob("*.ckpt")) for run in "ab"]
        assert names[0] == names[1]
        for name in names[0]:
            one, other = (torch.load(tmp_path / run / "checkpoints" / name, weights_only=True) for run in "ab")
            assert other.pop("dtrain_base")[""]["snapshot"][0].startswith("dtrain-base-")
            assert one.keys() == other.keys()
            assert same(one["state_dict"], other["state_dict"])
            assert one["callbacks"].keys() == {
                key.replace(str(tmp_path / "b"), str(tmp_path / "a")) for key in other["callbacks"]
            }
            Classifier().load_state_dict(other["state_dict"])

    def test_curves(self, tmp_path):
        self.run(tmp_path / "a")
        self.run(tmp_path / "b", compress(method=SEARCH, monitor="val_acc"))
        rows = []
        for run in "ab":
            with (tmp_path / run / "metrics.csv").open() as file:
                rows.append(
                    [{k: v for k, v in row.items() if not k.startswith("dtrain/")} for row in csv.DictReader(file)]
                )
        assert rows[0] == [row for row in rows[1] if row["epoch"]]

    @pytest.mark.filterwarnings("ignore:Found 1 module")
    def test_the_module(self, tmp_path):
        class Noting(Classifier):
            def __init__(self):
                super().__init__()
                self.best, self.seen, self.total = 0.0, [], torch.zeros(())
                self.model.body.weight.requires_grad_(False)
                self.model.norm.eval()

            def on_validation_epoch_end(self):
                super().on_validation_epoch_end()
                self.best += 1
                self.seen.append(self.current_epoch)
                self.total += 1

        class Look(pl.Callback):
            def look(self, module):
                return (
                    module.best,
                    list(module.seen),
                    float(module.total),
                    [part.training for part in module.modules()],
                    [param.requires_grad for param in module.parameters()],
                    [param.data_ptr() for param in module.parameters()],
                    module.val_acc._update_count,
                    module.trainer,
                    sorted(vars(module)),
                )

            def on_train_end(self, trainer, pl_module):
                self.looks = [*getattr(self, "looks", []), self.look(pl_module)]

        look, module = Look(), Noting()
        fit(module, tmp_path, look, compress(method=SEARCH))
        trainer = make_trainer(tmp_path, look, compress(method=SEARCH), look)
        trainer.fit(module, train_loader(), val_loader())
        assert look.looks[1] == look.looks[2]
        assert look.looks[2][-2] is trainer

    def test_metric_states_that_nobody_resets(self, tmp_path):
        class Hoarder(Classifier):
            def __init__(self):
                super().__init__()
                self.again = nn.ModuleDict({"again": self.train_acc})  # registered twice
                self.hoard = type(self.val_acc)(num_classes=CLASSES)

            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.hoard.update(self(batch[0]), batch[1])

        plain, module = Hoarder(), Hoarder()
        fit(plain, tmp_path)
        fit(module, tmp_path, compress(method=SEARCH))
        assert torch.equal(plain.hoard.tp, module.hoard.tp)
        assert plain.hoard._update_count == module.hoard._update_count

    def test_other_callbacks_do_not_notice(self, tmp_path):
        without, with_us = Recorder(), Recorder()
        fit(Classifier(), tmp_path, without)
        fit(Classifier(), tmp_path, with_us, compress(method=SEARCH))
        assert with_us.calls == without.calls
        assert with_us.calls.count(("on_fit_end", "")) == 1
        assert [call for call in with_us.calls if call[0] == "teardown"] == [("teardown", "fit")]

    def test_hooks_that_set_up_run_once(self, tmp_path):
        calls = []  # not an attribute: those are put back

        class SetUp(Classifier):
            def note(self, *what):
                calls.extend(what)

            def prepare_data(self):
                self.note("prepare_data")

            def setup(self, stage):
                self.note("setup", stage)

            def teardown(self, stage):
                self.note("teardown", stage)

            def configure_callbacks(self):
                self.note("callbacks")
                return [Recorder()]

            def configure_model(self):
                self.note("model")

        module = SetUp()
        fit(module, tmp_path, compress(method=SEARCH))
        assert calls == ["callbacks", "prepare_data", "setup", "fit", "model", "teardown", "fit"]
        assert "setup" not in vars(module)

    def test_a_data_module_does_not_notice(self, tmp_path):
        calls = []

        class Data(pl.LightningDataModule):
            def setup(self, stage):
                calls.append(stage)

            def teardown(self, stage):
                calls.append(stage)

            def train_dataloader(self):
                return train_loader()

            def val_dataloader(self):
                return val_loader()

            def on_before_batch_transfer(self, batch, dataloader_idx):
                assert self.trainer.training or self.trainer.validating or self.trainer.sanity_checking
                return [batch[0] + 1, batch[1]]

        data, callback = Data(), compress(method=SEARCH)
        trainer = make_trainer(tmp_path, callback)
        trainer.fit(Classifier(), data)
        assert calls == ["fit", "fit"]
        assert data.trainer is trainer
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])

    def test_what_the_module_sees(self, tmp_path):
        views = []

        class Curious(Classifier):
            def on_validation_start(self):
                self.logger.experiment.add_text("anything", "at all")
                self.loggers[1].log_image("x", [])
                rate = self.optimizers().param_groups[0]["lr"]
                views.append((self.global_step, self.trainer.max_epochs, rate, self.trainer.is_global_zero))

        class Text(Memory):
            experiment = SimpleNamespace(add_text=lambda *_: None)

            def log_image(self, *_):
                pass

        fit(Curious(), tmp_path, compress(), logger=[Text(), Text()])
        assert views[-3:] == [(6, 2, 0.01, True)] * 3

    @pytest.mark.parametrize("logger", [False, True])
    def test_files_that_the_module_writes(self, tmp_path, logger):
        class Writes(Classifier):
            def on_validation_end(self):
                Path(self.trainer.log_dir, "predictions.txt").write_text("private")

        class Mark(pl.Callback):
            def on_train_end(self, trainer, pl_module):
                self.path = Path(trainer.log_dir, "predictions.txt")
                self.path.write_text("the run's")

        mark = Mark()
        fit(Writes(), tmp_path, mark, compress(), logger=CSVLogger(tmp_path) if logger else False)
        assert mark.path.read_text() == "the run's"

    def test_quiet(self, tmp_path, capfd, recwarn):
        fit(Classifier(), tmp_path, checkpoints(tmp_path))
        plain, warned = capfd.readouterr(), len(recwarn)
        recwarn.clear()
        fit(Classifier(), tmp_path, compress(method=SEARCH), checkpoints(tmp_path))
        noisy = capfd.readouterr()
        assert noisy.err.count("Tip") == plain.err.count("Tip") <= 2
        assert noisy.err.count("\n") == plain.err.count("\n")
        assert len(recwarn) <= warned

    def test_a_second_fit(self, tmp_path):
        module, callback = Classifier(), compress(method=SEARCH)
        trainer = fit(module, tmp_path, callback)
        first = callback.outcome
        trainer.fit_loop.max_epochs = 4
        trainer.fit(module, train_loader(), val_loader())
        assert callback.outcome is not first
        assert callback.delta.content.metadata["training"]["epochs"] == 4
        callback.delta.verify(Classifier())  # still the base of the first

    def test_a_second_run_starts_from_what_the_first_made(self, tmp_path):
        module, callback = Classifier(), compress()
        fit(module, tmp_path, callback)
        middle = state(module)
        fit(module, tmp_path, callback)
        callback.delta.verify(middle)


class TestModule:
    def test_a_part(self, tmp_path):
        module, callback = Classifier(), compress(method=SEARCH, module="model")
        fit(module, tmp_path, callback)
        torch.manual_seed(0)
        plain = Net()
        callback.delta.apply_(plain)
        assert callback.outcome.report.whole == ("head.bias", "head.weight")
        assert torch.equal(plain.head.weight, module.model.head.weight)

    def test_an_unknown_part(self, tmp_path):
        with pytest.raises(InputError, match=r"no submodule 'net'\. It has: model, val_acc, train_acc"):
            fit(Classifier(), tmp_path, compress(module="net"))

    @pytest.mark.parametrize("part", ["", "model"])
    def test_compiled(self, tmp_path, part):
        module, callback = Classifier(), compress(method=SEARCH, module=part)
        plain = Classifier()
        module.model = torch.compile(module.model, backend="eager")
        fit(module, tmp_path, callback)
        callback.delta.apply_(plain if part == "" else plain.model)
        other = compress(method=SEARCH, module=part)
        fit(Classifier(), tmp_path, other)
        assert other.delta.file_bytes() == callback.delta.file_bytes()
        assert other.delta.content.fingerprint == callback.delta.content.fingerprint

    def test_built_late(self, tmp_path):
        class Late(Classifier):
            def __init__(self):
                super().__init__()
                self.model = None

            def configure_model(self):
                if self.model is None:
                    torch.manual_seed(3)
                    self.model = Net()

        callback = compress(method=SEARCH, module="model")
        fit(Late(), tmp_path, callback)
        torch.manual_seed(3)
        callback.delta.apply_(Net())

    def test_frozen_parameters_cost_nothing(self, tmp_path):
        module, callback = Classifier(), compress()
        module.model.body.requires_grad_(False)
        fit(module, tmp_path, callback)
        same_rows = [row for row in callback.outcome.report.rows if row.kind == "same"]
        assert same_rows[0].tensors == 2
        assert same_rows[0].payload_bytes == 0

    def test_tied_weights(self, tmp_path):
        class Tied(Classifier):
            def __init__(self):
                super().__init__()
                self.model.inner.weight = (
                    self.model.again.weight if hasattr(self.model, "again") else self.model.inner.weight
                )
                self.alias = nn.Linear(16, 16, bias=False)
                self.alias.weight = self.model.inner.weight  # sorts before the name in the model

        whole, part = compress(), compress(tmp_path / "part.safetensors", module="model", source="best")
        module = Tied()
        fit(module, tmp_path, whole, part, checkpoints(tmp_path, save_last=True))
        fresh = Tied()
        whole.delta.apply_(fresh)
        assert fresh.alias.weight is fresh.model.inner.weight
        assert "inner.weight" in part.delta.state_dict(Tied().model)
        part.delta.apply_(Tied().model)

    def test_persistent_metric_states_are_no_weights(self, tmp_path):
        class Persistent(Classifier):
            def __init__(self):
                super().__init__()
                self.val_acc.persistent(True)
                self.total = type(self.val_acc)(num_classes=CLASSES)
                self.total.persistent(True)

            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.total.update(self(batch[0]), batch[1])

        module, callback, fresh = Persistent(), compress(method=SEARCH), Persistent()
        fit(module, tmp_path, callback, num_sanity_val_steps=0)
        assert module.total.tp.sum() > 0
        before = state(fresh)
        callback.delta.apply_(fresh)
        assert not fresh.total.tp.sum()
        callback.delta.remove_(fresh)
        assert same(state(fresh), before)

    def test_best(self, tmp_path):
        callback = compress(source="best", method=SEARCH)
        saver = checkpoints(tmp_path, monitor="val_loss", mode="max")  # the worst, which is the first
        trainer = fit(Classifier(), tmp_path, callback, saver, epochs=3)
        best = torch.load(saver.best_model_path, weights_only=True)
        assert best["epoch"] == 0
        assert torch.equal(
            callback.delta.state_dict(Classifier())["model.head.weight"], best["state_dict"]["model.head.weight"]
        )
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(saver.best_model_score)
        assert not torch.equal(trainer.lightning_module.model.head.weight, best["state_dict"]["model.head.weight"])

    def test_best_without_checkpoints(self, tmp_path):
        with pytest.raises(InputError, match=r"source='best' needs a checkpoint callback"):
            fit(Classifier(), tmp_path, compress(source="best"))


class TestGuards:
    def test_fast_dev_run(self, tmp_path):
        callback = compress(tmp_path / "delta.safetensors", method=SEARCH, source="best")
        fit(Classifier(), tmp_path, callback, checkpoints(tmp_path), fast_dev_run=True)
        assert callback.outcome is None
        assert not list(tmp_path.rglob("*.safetensors*"))

    def test_other_stages(self, tmp_path):
        callback = compress(tmp_path / "delta.safetensors", monitor="nothing")

        class Predicts(Classifier):
            test_step = Classifier.validation_step

            def predict_step(self, batch, batch_idx):
                return self(batch[0])

        trainer, module = make_trainer(tmp_path, callback), Predicts()
        trainer.validate(module, val_loader(), verbose=False)
        trainer.test(module, val_loader(), verbose=False)
        trainer.predict(module, val_loader())
        assert callback.outcome is None
        assert not list(tmp_path.rglob("*.safetensors*"))

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("when", ["training", "search", "measure"])
    def test_failed_or_interrupted(self, tmp_path, error, when):
        path = tmp_path / "out" / "delta.safetensors"
        path.parent.mkdir()
        path.write_bytes(b"old")

        class Breaks(Classifier):
            def validation_step(self, batch, batch_idx):
                if when == "search" and self.trainer.global_step == 6 and self.trainer.limit_val_batches == 8:
                    raise error("broken")
                super().validation_step(batch, batch_idx)

        class Last(pl.Callback):
            def on_train_end(self, trainer, pl_module):
                self.state = state(pl_module)

        class Unwritable(DeltaCompressionCallback):
            def _measure(self, *_):
                raise error("broken")

        kind = Unwritable if when == "measure" else DeltaCompressionCallback
        last, callback, module = Last(), kind(SEARCH, path), Breaks()
        crash = [Crash(1, error)] if when == "training" else []
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            fit(module, tmp_path, last, callback, *crash)
        files = list(path.parent.iterdir())
        assert files == [path]
        assert (path.read_bytes() == b"old") == (when != "measure")
        assert callback.outcome is None
        if when != "training":
            assert same(state(module), last.state)
            assert not module.model.body._forward_pre_hooks
            assert "setup" not in vars(module)

    def test_an_interrupt_of_the_search_is_one_of_the_run(self, tmp_path):
        class Interrupted(Classifier):
            def validation_step(self, batch, batch_idx):
                if self.trainer.limit_val_batches == 8:
                    raise KeyboardInterrupt
                super().validation_step(batch, batch_idx)

        class Notes(pl.Callback):
            def on_exception(self, trainer, pl_module, exception):
                self.seen = (trainer, pl_module.trainer, type(exception))

        notes = Notes()
        with pytest.raises(SystemExit):
            fit(Interrupted(), tmp_path, notes, compress(method=SEARCH))
        assert notes.seen[0] is notes.seen[1]
        assert notes.seen[2] is KeyboardInterrupt

    def test_a_path_that_cannot_be(self, tmp_path):
        module = Classifier()
        with pytest.raises(InputError, match="is the folder"):
            fit(module, tmp_path, compress(tmp_path))
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot be written to"):
            fit(module, tmp_path, compress(tmp_path / "file" / "delta.safetensors"))

    def test_a_stopped_run_is_compressed(self, tmp_path):
        callback = compress(monitor="val_acc")
        stop = EarlyStopping("val_acc", mode="min", patience=1, verbose=False)
        fit(Classifier(), tmp_path, callback, stop, epochs=20)
        assert callback.outcome.path.exists()

    def test_nothing_was_learned(self, tmp_path):
        class Frozen(Classifier):
            def __init__(self):
                super().__init__(lr=0.0)
                self.model.norm = nn.Identity()

        with pytest.raises(InputError, match="equals its base"):
            fit(Frozen(), tmp_path, compress(whole=[]))

    @pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
    def test_sharded(self, tmp_path, name):
        callback = compress()
        trainer = make_trainer(tmp_path, callback)
        trainer.strategy.__class__ = type(name, (type(trainer.strategy),), {})
        with pytest.raises(DtrainError, match=rf"does not work with {name}"):
            callback.setup(trainer, Classifier(), "fit")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"mode": "up"}, "`mode` must be one of 'max', 'min', None, got 'up'"),
            ({"source": "first"}, "`source` must be one of"),
            ({"fit_on": "loss"}, "`fit_on` must be one of"),
            ({"calibration_batches": 0}, "at least 1, got 0"),
            ({"exclude": "body.*"}, "must be a list of patterns"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            DeltaCompressionCallback(**options)


AVERAGING = (
    lambda: WeightAveraging(),
    lambda: EMAWeightAveraging(decay=0.5),
    lambda: StochasticWeightAveraging(0.01, swa_epoch_start=1),
)


class TestOrder:
    @pytest.mark.parametrize("make", AVERAGING, ids=["average", "ema", "swa"])
    def test_behind_us(self, tmp_path, make):
        with pytest.raises(InputError, match=r"Put DeltaCompressionCallback behind (Stochastic)?WeightAveraging"):
            fit(Classifier(), tmp_path, compress(), make())

    @pytest.mark.parametrize("make", AVERAGING, ids=["average", "ema", "swa"])
    @pytest.mark.filterwarnings("ignore:Swapping scheduler")
    def test_before_us(self, tmp_path, make):
        class Plain(Classifier):
            def __init__(self):
                super().__init__()
                self.model.norm = nn.Identity()  # SWA would train one more epoch for its buffers

        module, callback = Plain(), compress()
        fit(module, tmp_path, make(), callback, epochs=3)
        merged = callback.delta.state_dict(Plain())
        assert torch.equal(merged["model.head.weight"], module.model.head.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI uses what jsonargparse is to drop
class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _no_arguments_of_pytest(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["train.py"])

    def cli(self, *arguments):
        from lightning.pytorch.cli import LightningCLI

        class Data(pl.LightningDataModule):
            pass

        given = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
        return LightningCLI(
            Classifier, Data, run=False, args=[*given, *arguments], save_config_callback=None, seed_everything_default=0
        )

    NAME = "--trainer.callbacks+=dtrain.callbacks.DeltaCompressionCallback"
    EVERYTHING = (
        "--trainer.callbacks.method=dtrain.DareX",
        "--trainer.callbacks.method.keep=0.05",
        "--trainer.callbacks.method.q=norm",
        "--trainer.callbacks.path=out.safetensors",
        "--trainer.callbacks.monitor=val_acc",
        "--trainer.callbacks.mode=min",
        "--trainer.callbacks.source=best",
        "--trainer.callbacks.module=model",
        "--trainer.callbacks.base=base.ckpt",
        "--trainer.callbacks.fit_on=metric",
        "--trainer.callbacks.calibration_batches=3",
        "--trainer.callbacks.include=[a.*]",
        "--trainer.callbacks.exclude=[b.*,c]",
        "--trainer.callbacks.whole=[]",
        "--trainer.callbacks.drop=[d]",
    )

    def callback(self, trainer):
        return next(callback for callback in trainer.callbacks if isinstance(callback, DeltaCompressionCallback))

    def test_no_argument(self):
        callback = self.callback(self.cli(self.NAME).trainer)
        assert callback.method == dtrain.DareX()

    def test_every_argument(self):
        callback = self.callback(self.cli(self.NAME, *self.EVERYTHING).trainer)
        self.check(callback)

    def check(self, callback):
        assert callback.method == dtrain.DareX(keep=0.05, q="norm")
        assert (str(callback.path), callback.monitor, callback.mode) == ("out.safetensors", "val_acc", "min")
        assert (callback.source, callback.module, callback.fit_on) == ("best", "model", "metric")
        assert callback.calibration_batches == 3
        assert callback.rules == dtrain.Rules(include=["a.*"], exclude=["b.*", "c"], whole=[], drop=["d"])

    def test_print_config_round_trip(self, capsys, tmp_path):
        with pytest.raises(SystemExit):
            self.cli(self.NAME, *self.EVERYTHING, "--print_config")
        (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
        self.check(self.callback(self.cli(f"--config={tmp_path / 'config.yaml'}").trainer))

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("source=first", "'last', 'best'"),
            ("mode=up", "'max', 'min'"),
            ("method.mask=dense", "'bernoulli', 'stratified'"),
        ],
    )
    def test_bad_literal(self, capsys, argument, message):
        method = ["--trainer.callbacks.method=dtrain.DareX"] if "method" in argument else []
        with pytest.raises(SystemExit):
            self.cli(self.NAME, *method, f"--trainer.callbacks.{argument}")
        assert message in capsys.readouterr().err

    def test_flags_of_their_own(self):
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser()
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        given = [argument.replace("trainer.callbacks", "compress") for argument in self.EVERYTHING]
        config = parser.parse_args(given)
        again = parser.parse_string(parser.dump(config))
        self.check(parser.instantiate(again).compress)

    def test_help(self, capsys):
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser()
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert "Number of training batches for the fit" in capsys.readouterr().out


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
