"""What DeltaCompressionCallback leaves alone: the run, its metrics, callbacks, checkpoints and random numbers."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from tests.callbacks.models import (
    CLASSES,
    QUIET,
    SEARCH,
    Classifier,
    Memory,
    Recorder,
    checkpoints,
    compress,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

pytestmark = QUIET


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
