"""The private look at a module: it sees what the run sees, and leaves no trace."""

from __future__ import annotations

import logging
import random
import signal
import warnings
from collections import deque
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from dtrain.callbacks.evaluation import mean_over_ranks, validate
from dtrain.callbacks.objective import ValidationObjective, calibration_loader, goal, pick
from dtrain.callbacks.undisturbed import undisturbed
from dtrain.errors import InputError
from tests.callbacks.models import Classifier, Recorder, TwoLoaders, dataset, fit, same, state, train_loader, val_loader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


class Inside(pl.Callback):
    """Runs a function when training ends."""

    def __init__(self, function):
        self.function = function

    def on_train_end(self, trainer, pl_module):
        self.result = self.function(trainer, pl_module)


def inside(function, folder, module=None, **options):
    """Return what `function` returns at the end of a run."""
    callback = Inside(function)
    fit(Classifier() if module is None else module, folder, callback, **options)
    return callback.result


class TestValidate:
    def test_weights_stay_where_they_are(self, tmp_path):
        """A strategy moves a module to its device and back to the CPU: whoever holds the tensors would lose them."""

        def look(trainer, module):
            module.cpu = module.to = module.cuda = module._apply = pytest.fail
            try:
                return validate(trainer, module)
            finally:
                for name in ("cpu", "to", "cuda", "_apply"):
                    vars(module).pop(name)

        assert "val_acc" in inside(look, tmp_path)

    def test_instead_of_every_loader(self, tmp_path):
        def look(trainer, module):
            return validate(trainer, module, instead=train_loader(), batches=2)

        found = inside(look, tmp_path, TwoLoaders(), val=[val_loader(), val_loader(3)])
        assert found["val_loss/dataloader_idx_0"] == found["val_loss/dataloader_idx_1"]

    @pytest.mark.parametrize("inference", [True, False])
    def test_inference_mode_is_that_of_the_run(self, tmp_path, inference):
        class Mode(Classifier):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.modes = (*getattr(self, "modes", ()), torch.is_inference_mode_enabled())
                self.log("inference", float(torch.is_inference_mode_enabled()))

        assert inside(validate, tmp_path, Mode(), inference_mode=inference)["inference"] == float(inference)

    def test_settings_from_the_environment_are_for_the_run(self, tmp_path, monkeypatch):
        def look(trainer, module):
            monkeypatch.setenv("PL_TRAINER_LIMIT_VAL_BATCHES", "1")
            monkeypatch.setenv("PL_TRAINER_LOGGER", "true")
            found = validate(trainer, module)
            return found, trainer.callback_metrics

        found, logged = inside(look, tmp_path)
        assert found["val_loss"] == float(logged["val_loss"])
        assert not list(tmp_path.iterdir())

    def test_callbacks_of_installed_packages_belong_to_the_run(self, tmp_path, monkeypatch):
        from lightning.pytorch.trainer.connectors import callback_connector

        recorder = Recorder()

        def look(trainer, module):
            monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: [recorder])
            return validate(trainer, module)

        inside(look, tmp_path)
        assert recorder.calls == []

    def test_global_state_is_put_back(self, tmp_path):
        def look(trainer, module):
            def everything():
                return (
                    torch.get_rng_state().tolist(),
                    random.getstate(),
                    np.random.get_state()[1].tolist(),  # noqa: NPY002
                    {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)},
                    torch.are_deterministic_algorithms_enabled(),
                    torch.get_default_dtype(),
                    torch.is_grad_enabled(),
                    logging.getLogger("lightning.pytorch").level,
                    list(warnings.filters),
                )

            before = everything()
            validate(trainer, module)
            return before == everything()

        assert inside(look, tmp_path)

    def test_slurm_would_requeue_the_run_only(self, tmp_path, monkeypatch):
        def look(trainer, module):
            for name, value in {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_NAME": "train"}.items():
                monkeypatch.setenv(name, value)
            handlers = []

            class Watch(pl.Callback):
                def on_validation_start(self, trainer, pl_module):
                    handlers.append(signal.getsignal(signal.SIGUSR1))

            validate(trainer, module, watch=Watch())
            return handlers

        assert inside(look, tmp_path) == [signal.getsignal(signal.SIGUSR1)]

    def test_the_same_random_numbers_each_time(self, tmp_path):
        class Random(Classifier):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.log("random", torch.rand(()) + random.random() + np.random.rand())  # noqa: NPY002, S311

        def look(trainer, module):
            torch.manual_seed(5)
            first = validate(trainer, module)
            torch.manual_seed(6)
            return first, validate(trainer, module)

        first, second = inside(look, tmp_path, Random())
        assert first == second


class TestUndisturbed:
    class Odd(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            self.table, self.numbers, self.line = {"a": [1]}, {1}, deque([1])
            self.expanded = torch.zeros(1).expand(3)
            self.layer.total = torch.zeros(2)
            self.shared = self.layer.total
            with torch.inference_mode():
                self.inferred = torch.zeros(2)

        def setup(self, stage):
            raise AssertionError("the run is set up")

    def test_attributes(self):
        module = self.Odd()
        total, inferred, before = module.shared, module.inferred, state(module)
        module.layer.weight.grad = torch.ones(2, 2)
        with undisturbed(module, pl.LightningModule):
            module.setup("validate")
            module.zero_grad()
            module.table["b"], module.extra = 1, 2
            module.numbers.add(2)
            module.line.append(2)
            module.layer.total += 1
            with torch.inference_mode():
                module.inferred += 1
            module.shared = None
            module.eval()
        assert module.table == {"a": [1]}
        assert module.numbers == {1}
        assert module.line == deque([1])
        assert not hasattr(module, "extra")
        assert module.shared is module.layer.total is total
        assert module.inferred is inferred
        assert not total.any()
        assert not inferred.any()
        assert module.layer.training
        assert module.layer.weight.grad is not None
        assert same(state(module), before)
        with pytest.raises(AssertionError, match="the run is set up"):
            module.setup("fit")

    def test_after_an_error(self):
        module = self.Odd()
        names = set(vars(module))
        with pytest.raises(KeyError), undisturbed(module, pl.LightningModule):
            module.extra = {}["nothing"]
        assert set(vars(module)) == names

    def test_weights_are_not_its_business(self):
        module = self.Odd()
        with torch.no_grad(), undisturbed(module, pl.LightningModule):
            module.layer.weight.fill_(7)
        assert (module.layer.weight == 7).all()


def objective_of(trainer, module, target, batches, *metric):
    return ValidationObjective(trainer, module, target, calibration_loader(trainer, module), batches, *metric)


class TestObjective:
    def test_hidden_change(self, tmp_path):
        def look(trainer, module):
            objective = objective_of(trainer, module, module.model, 2)
            objective.remember()
            first = objective.loss()
            with torch.no_grad():
                module.model.head.weight.add_(1)  # comes after the hidden state
                second = objective.loss()
                module.model.inner.weight.add_(1)
            return first, second, objective.loss(), objective.label

        first, second, third, label = inside(look, tmp_path)
        assert first == second == 0
        assert third > 0
        assert label == "hidden change"

    @pytest.mark.parametrize(("mode", "sign"), [("max", -1), ("min", 1)])
    def test_metric(self, tmp_path, mode, sign):
        def look(trainer, module):
            objective = objective_of(trainer, module, module, 3, "val_acc", mode)
            objective.remember()
            with torch.no_grad():
                model, (x, y) = module.model.eval(), dataset().tensors
                return objective.loss(), float((model(x).argmax(1) == y).float().mean())

        loss, accuracy = inside(look, tmp_path)
        assert loss == pytest.approx(sign * accuracy)

    def test_unknown_metric(self, tmp_path):
        def look(trainer, module):
            return objective_of(trainer, module, module, 3, "acc").loss()

        with pytest.raises(InputError, match=r"logs val_acc, val_loss, val_spread, but `monitor` is 'acc'"):
            inside(look, tmp_path)

    def test_compiled_code_is_captured(self, tmp_path):
        module = Classifier()
        module.model = torch.compile(module.model, backend="eager")

        def look(trainer, module):
            objective = objective_of(trainer, module, module, 1)
            objective.remember()
            return objective._target[0].shape

        assert inside(look, tmp_path, module, num_sanity_val_steps=0) == (16, 16)

    def test_no_hook_stays(self, tmp_path):
        def look(trainer, module):
            objective_of(trainer, module, module, 1).remember()
            return [len(part._forward_pre_hooks) for part in module.modules()]

        assert not any(inside(look, tmp_path))


class TestCalibration:
    def loader(self, given, **owners):
        trainer = SimpleNamespace(train_dataloader=given, datamodule=owners.get("datamodule"))
        return calibration_loader(trainer, owners.get("module", nn.Module()))

    @pytest.mark.parametrize("options", [{"shuffle": True}, {"num_workers": 1}, {"drop_last": True}])
    def test_all_training_data_shuffled_once(self, options):
        loader = self.loader(train_loader(**options))
        seen = torch.cat([x for x, _ in loader])
        assert torch.equal(seen, torch.cat([x for x, _ in self.loader(train_loader(**options))]))
        assert not torch.equal(seen, dataset().tensors[0])  # a data set may be sorted by class
        assert torch.equal(seen.sort(0).values, dataset().tensors[0].sort(0).values)
        assert loader.batch_size == 16

    def test_own_batches(self):
        sampler = BatchSampler(SequentialSampler(dataset()), batch_size=6, drop_last=False)
        assert self.loader(DataLoader(dataset(), batch_sampler=sampler)).batch_size == 6
        lists = DataLoader(dataset(), batch_sampler=[[0, 1], [2]])
        assert self.loader(lists).batch_size == 32
        assert self.loader(DataLoader(dataset(), batch_size=None)).batch_size is None

    def test_the_data_module_is_asked_first(self):
        first, second = (SimpleNamespace(calibration_dataloader=lambda name=name: name) for name in ("data", "module"))
        assert self.loader(None, datamodule=first, module=second) == "data"
        assert self.loader(None, module=second) == "module"


class TestRanks:
    def ranks(self, *values):
        """Return what each of several ranks gets."""
        tables = []

        def reduce(table, reduce_op):
            assert reduce_op == "sum"
            tables.append(table)
            return sum(tables)

        strategy = SimpleNamespace(
            broadcast=lambda names: sorted(values[0]), reduce=reduce, root_device=torch.device("cpu")
        )
        trainer = SimpleNamespace(world_size=len(values), strategy=strategy)
        return [mean_over_ranks(trainer, found) for found in values][-1]

    def test_mean(self):
        assert self.ranks({"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 3.0}) == {"a": 1.5, "b": 3.0}

    def test_what_only_one_rank_logs(self):
        assert self.ranks({"a": 1.0, "b": 3.0}, {"a": 2.0, "c": 9.0}) == {"a": 1.5, "b": 3.0}

    def test_equal_values_stay_exact(self):
        value = float(torch.tensor(0.1))
        assert self.ranks(*[{"a": value}] * 3) == {"a": value}

    def test_one_process(self):
        assert mean_over_ranks(SimpleNamespace(world_size=1), {"a": 1.0}) == {"a": 1.0}


def test_goal():
    def find(theirs, monitor, mode):
        return goal(SimpleNamespace(checkpoint_callback=theirs), monitor, mode)

    loss = SimpleNamespace(monitor="loss", mode="min")
    assert find(None, None, None) == (None, "max")
    assert find(None, "acc", None) == ("acc", "max")
    assert find(loss, None, None) == find(loss, "loss", None) == ("loss", "min")
    assert find(loss, "acc", None) == ("acc", "max")
    assert find(loss, None, "max") == ("loss", "max")
    assert find(SimpleNamespace(monitor=None, mode="min"), None, None) == (None, "max")


def test_pick():
    assert pick({"a": 1.0}, "a") == 1.0
    with pytest.raises(InputError, match="logs nothing, but `monitor` is 'a'"):
        pick({}, "a")
