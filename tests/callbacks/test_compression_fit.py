"""DeltaCompressionCallback: what q is fitted on, and which modules it can compress."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import dtrain
from dtrain.errors import InputError
from tests.callbacks.models import (
    CLASSES,
    FEATURES,
    QUIET,
    SEARCH,
    Classifier,
    Net,
    checkpoints,
    compress,
    dataset,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

pytestmark = QUIET


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
        assert fitted["loss"] <= fitted["start"]

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

        callback = compress(method=SEARCH)
        fit(Convolutional(), tmp_path, callback)
        assert self.objective(callback) == "hidden change"  # of the output

    def test_no_linear_layer_and_no_single_call(self, tmp_path):
        class Parts(Classifier):
            def __init__(self):
                super().__init__()
                self.model = nn.ModuleList([nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, CLASSES, FEATURES)])
                self.scale = nn.LayerNorm(CLASSES)

            def forward(self, x):
                return self.scale(self.model[1](self.model[0](x)).flatten(1))

            def validation_step(self, batch, batch_idx):
                self.log("val_loss", nn.functional.cross_entropy(Parts.forward(self, batch[0]), batch[1]))

            def on_validation_epoch_end(self):
                pass

        with pytest.raises(InputError, match=r"no linear layer.*fit_on='metric'"):
            fit(Parts(), tmp_path, compress(method=SEARCH))

    def test_random_inputs_are_the_same_in_every_evaluation(self, tmp_path):
        class Noisy(Classifier):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return batch[0] + torch.randn_like(batch[0]), batch[1]

        callback = compress(method=dtrain.DareX(keep=1.0, q=1.0), vectors="float16", fresh="exact")
        fit(Noisy(), tmp_path, callback)
        scores = callback.outcome.scores
        assert scores["compressed"]["val_loss"] == pytest.approx(scores["finetuned"]["val_loss"], rel=1e-3)


class TestModule:
    def test_a_part(self, tmp_path):
        module, callback = Classifier(), compress(method=SEARCH, module="model")
        fit(module, tmp_path, callback)
        torch.manual_seed(0)
        plain = Net()
        callback.delta.apply_(plain)
        assert callback.outcome.report.whole == ("head.bias", "head.weight")
        assert torch.equal(plain.head.bias, module.model.head.bias)

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
        same_rows = [row for row in callback.outcome.report.rows if row.done == "same"]
        assert sum(row.tensors for row in same_rows) == 2
        assert all(row.payload_bytes == 0 for row in same_rows)

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
            callback.delta.state_dict(Classifier())["model.head.bias"], best["state_dict"]["model.head.bias"]
        )
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(saver.best_model_score)
        assert not torch.equal(trainer.lightning_module.model.head.weight, best["state_dict"]["model.head.weight"])

    def test_best_without_checkpoints(self, tmp_path):
        with pytest.raises(InputError, match=r"source='best' needs a checkpoint callback"):
            fit(Classifier(), tmp_path, compress(source="best"))


class TestCalibration:
    """Methods that look at the inputs of layers."""

    @pytest.mark.parametrize(
        "method", [dtrain.Wanda(keep=0.5), dtrain.EoRA(host=dtrain.BitDelta(), rank=1)], ids=lambda m: type(m).__name__
    )
    def test_the_inputs_are_those_of_training_batches(self, tmp_path, method):
        module = TestFit.Calibrated()
        callback = compress(method=method, calibration_batches=2)
        fit(module, tmp_path, callback)
        assert module.asked == 1
        metadata = callback.delta.content.metadata
        assert metadata["uncalibrated"] == []
        batches = [batch for batch, _ in zip(module.calibration_dataloader(), range(2), strict=False)]
        calibration = dtrain.Calibration(module, batches, lambda net, batch: net(batch[0]))
        base = callback.read_base(module.trainer)
        again = dtrain.compress(base, module, method, calibration=calibration)
        assert same(again.state_dict(base), callback.delta.state_dict(base))

    def test_one_process_only(self, tmp_path, monkeypatch):
        trainer = make_trainer(tmp_path, compress(method=dtrain.Wanda(keep=0.5)))
        monkeypatch.setattr(type(trainer), "world_size", property(lambda _: 2))
        with pytest.raises(InputError, match=r"Wanda measures the inputs of layers, .* the 2 processes"):
            trainer.fit(Classifier(), train_loader(), val_loader())
