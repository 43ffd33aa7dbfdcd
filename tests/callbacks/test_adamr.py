"""AdamRCallback inside Lightning: when it fires, what it moves, what survives a crash, what it refuses."""

from __future__ import annotations

import pickle
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BaseFinetuning, Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dtrain.callbacks.adamr import BASE_KEY, AdamRCallback
from dtrain.errors import DtrainError, InputError
from dtrain.optim import AdamR
from dtrain.optim.decay import decay_

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]

MATRICES = ["body.0.weight", "body.2.weight"]


def adam(module):
    return torch.optim.Adam(module.parameters(), lr=0.01)


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Tiny(pl.LightningModule):
    """Two matrices to pull, beside biases, a norm and a head that are not."""

    def __init__(self, make_optimizer=adam):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 2)
        self.make_optimizer = make_optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self.head(torch.tanh(self.body(x))), y)

    def configure_optimizers(self):
        return self.make_optimizer(self)


def loader(batch_size=4, rows=32):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(rows, columns, generator=generator) for columns in (6, 2))
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def make_trainer(*callbacks, epochs=2, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(callbacks=list(callbacks), max_epochs=epochs, **{**defaults, **options})


def fit(module, *callbacks, batch_size=4, ckpt_path=None, **options):
    trainer = make_trainer(*callbacks, **options)
    trainer.fit(module, loader(batch_size), ckpt_path=ckpt_path)
    return trainer


def weights(module):
    return {name: param.detach().clone() for name, param in module.named_parameters()}


class Counting(AdamRCallback):
    """Counts how often the hook runs, and notes the learning rate it sees."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls, self.rates = 0, []

    def _after_step(self, optimizer, args, kwargs):
        self.calls += 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        super()._after_step(optimizer, args, kwargs)


class Crash(Callback):
    """Breaks the run at the start of one epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("crash")


def crash_and_resume(tmp_path, epoch, make_optimizer=adam, before=None, after=None, **options):
    """Return the module of a run that crashed, resumed in a fresh process' state and ended after four epochs."""
    before = [AdamRCallback(0.5, **options)] if before is None else before
    after = [AdamRCallback(0.5, **options)] if after is None else after
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with pytest.raises(RuntimeError, match="crash"):
        fit(Tiny(make_optimizer), *before, saver, Crash(epoch), epochs=4)
    module = Tiny(make_optimizer)
    with torch.no_grad():  # what the fresh process starts from must not matter
        for param in module.parameters():
            param.add_(1)
    saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    trainer = fit(module, *after, saver, epochs=4, ckpt_path=tmp_path / "last.ckpt")
    return module, trainer


class TestPull:
    @pytest.mark.parametrize("norm", ["l2", "l1"])
    @pytest.mark.parametrize("normalizer", ["stable", "none"])
    def test_is_the_optimizer_half_a_step_ahead(self, norm, normalizer):
        """Pulling after each step is pulling before each step and once more at the end, where the rate stands still."""
        exact, hooked = (nn.Parameter(torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)) for _ in range(2))
        base, grad = exact.detach().clone(), torch.linspace(0.5, 2, 24, dtype=torch.float64).view(4, 6)
        settings = {"strength": 0.5, "norm": norm, "normalizer": normalizer}
        adamr, plain = AdamR([exact], lr=0.01, **settings), torch.optim.Adam([hooked], lr=0.01)
        module = pl.LightningModule()
        module.matrix = hooked
        AdamRCallback(**settings).on_train_start(SimpleNamespace(optimizers=[plain]), module)
        for _ in range(10):
            exact.grad, hooked.grad = grad.clone(), grad.clone()
            adamr.step()
            plain.step()
        rate = 0.5 * 0.01 / (grad.square().mean().sqrt() if normalizer == "stable" else 1.0)
        decay_([exact], [base], rate, norm)
        torch.testing.assert_close(hooked, exact, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("normalizer", ["stable", "none"])
    def test_agrees_with_the_optimizer_to_second_order(self, normalizer):
        strength = 0.05 if normalizer == "stable" else 1.0

        def adamr(module):
            pulled = [param for name, param in module.named_parameters() if name in MATRICES]
            others = [param for name, param in module.named_parameters() if name not in MATRICES]
            groups = [{"params": pulled}, {"params": others, "strength": 0.0}]
            return AdamR(groups, lr=0.001, strength=strength, normalizer=normalizer)

        exact, hooked = Tiny(adamr), Tiny(lambda module: torch.optim.Adam(module.parameters(), lr=0.001))
        plain = Tiny(hooked.make_optimizer)
        start = weights(exact)
        fit(exact)
        fit(hooked, AdamRCallback(strength, normalizer=normalizer))
        fit(plain)
        for name in MATRICES:
            gap = (weights(hooked)[name] - weights(exact)[name]).norm()
            effect = (weights(plain)[name] - weights(exact)[name]).norm()
            delta = (weights(exact)[name] - start[name]).norm()
            assert gap < 0.25 * effect  # one step's pull, out of sixteen
            assert gap < 0.05 * delta

    def test_a_rate_above_one_lands_on_the_base(self):
        module = Tiny()
        start = weights(module)
        callback = AdamRCallback(1e6)
        fit(module, callback)
        for name, param in module.named_parameters():
            assert torch.equal(param, start[name]) == (name in MATRICES)
        assert callback.clamped_steps == 16

    def test_excluded_parameters_are_left_alone(self):
        module = Tiny()
        start = weights(module)
        fit(module, AdamRCallback(1e6, exclude=["body.2.*"]))
        assert torch.equal(module.body[0].weight, start["body.0.weight"])
        assert not torch.equal(module.body[2].weight, start["body.2.weight"])

    def test_two_callbacks_with_their_own_parameters(self):
        module = Tiny()
        start = weights(module)
        fit(module, AdamRCallback(1e6, include=["body.0.*"]), AdamRCallback(0.0, include=["body.2.*"]))
        assert torch.equal(module.body[0].weight, start["body.0.weight"])
        assert not torch.equal(module.body[2].weight, start["body.2.weight"])

    def test_strength_zero_is_plain_training(self):
        plain, hooked = Tiny(), Tiny()
        fit(plain)
        trainer = fit(hooked, AdamRCallback(0.0))
        assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), hooked.parameters(), strict=True))
        assert not any(BASE_KEY in state for state in trainer.optimizers[0].state.values())

    @pytest.mark.parametrize("make_optimizer", [sgd, lambda m: torch.optim.Adagrad(m.parameters(), lr=0.01)])
    def test_any_optimizer_without_normalizer(self, make_optimizer):
        module, plain = Tiny(make_optimizer), Tiny(make_optimizer)
        start = weights(module)
        fit(module, AdamRCallback(2.0, normalizer="none"))
        fit(plain)
        for name in MATRICES:
            assert (weights(module)[name] - start[name]).norm() < (weights(plain)[name] - start[name]).norm()

    @pytest.mark.parametrize(
        "make",
        [
            lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
            lambda m: torch.optim.RAdam(m.parameters(), lr=0.01),
            lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
        ],
        ids=["nadam", "radam", "fused"],
    )
    def test_the_adam_family_with_normalizer(self, make):
        module = Tiny(make)
        start = weights(module)
        fit(module, AdamRCallback(1e6))
        assert torch.equal(module.body[0].weight, start["body.0.weight"])

    def test_a_compiled_part_keeps_its_names(self):
        module = Tiny()
        start = weights(module)
        module.body = torch.compile(module.body, backend="eager")
        fit(module, AdamRCallback(1e6, include=["body.0.weight"]))
        assert torch.equal(module.body._orig_mod[0].weight, start["body.0.weight"])


class TestWhen:
    def test_once_per_step_with_accumulation(self):
        callback = Counting(0.1)
        trainer = fit(Tiny(), callback, accumulate_grad_batches=3)
        assert callback.calls == trainer.global_step == 6  # eight batches an epoch: 3 + 3 + 2

    def test_sees_the_lr_of_the_step(self):
        def scheduled(module):
            optimizer = torch.optim.Adam(module.parameters(), lr=1.0)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        callback = Counting(0.1)
        fit(Tiny(scheduled), callback, epochs=1, limit_train_batches=3)
        assert callback.rates == [1.0, 0.5, 0.25]

    def test_parameters_without_gradient_keep_still_and_keep_their_state_empty(self):
        class Sparse(Tiny):
            def training_step(self, batch, batch_idx):
                return self.body[0](batch[0]).square().mean()

        module = Sparse()
        trainer = fit(module, AdamRCallback(0.5))
        assert module.body[2].weight not in trainer.optimizers[0].state
        assert BASE_KEY in trainer.optimizers[0].state[module.body[0].weight]

    def test_unfrozen_on_the_way(self):
        class Unfreeze(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module.body)

            def finetune_function(self, pl_module, epoch, optimizer):
                if epoch == 1:
                    self.unfreeze_and_add_param_group(pl_module.body, optimizer)

        def only_trainable(module):
            return torch.optim.Adam([p for p in module.parameters() if p.requires_grad], lr=0.01)

        module = Tiny(only_trainable)
        start = weights(module)
        fit(module, AdamRCallback(1e6), Unfreeze(), epochs=3)
        assert torch.equal(module.body[0].weight, start["body.0.weight"])
        assert not torch.equal(module.body[0].bias, start["body.0.bias"])

    def test_manual_optimization_with_two_optimizers(self):
        class Manual(Tiny):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                for index, optimizer in enumerate(self.optimizers()):
                    if index == 1 and batch_idx % 2:
                        continue
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

            def configure_optimizers(self):
                first = torch.optim.Adam(self.body[0].parameters(), lr=0.01)
                rest = [*self.body[2].parameters(), *self.head.parameters()]
                return [first, torch.optim.AdamW(rest, lr=0.01, weight_decay=0)]

        module, callback = Manual(), Counting(1e6)
        start = weights(module)
        fit(module, callback, epochs=1)
        assert callback.calls == 8 + 4
        assert all(torch.equal(weights(module)[name], start[name]) for name in MATRICES)

    def test_hooks_are_gone_after_the_end(self):
        callback = AdamRCallback(0.5)
        trainer = fit(Tiny(), callback)
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
        assert not callback._handles
        assert not callback._waiting
        pickle.dumps(callback)

    def test_hooks_are_gone_after_an_exception(self):
        callback = AdamRCallback(0.5)
        trainer = make_trainer(callback, Crash(1))
        with pytest.raises(RuntimeError, match="crash"):
            trainer.fit(Tiny(), loader())
        assert not trainer.optimizers[0]._optimizer_step_post_hooks
        assert not callback._handles

    def test_a_second_fit_starts_over(self):
        module, callback = Tiny(), AdamRCallback(1e6)
        fit(module, callback)
        with torch.no_grad():
            module.body[0].weight.add_(1)
        start = weights(module)
        fit(module, callback)
        assert torch.equal(module.body[0].weight, start["body.0.weight"])
        assert callback.clamped_steps == 16


class TestResume:
    @pytest.mark.parametrize("epoch", [1, 3])
    @pytest.mark.parametrize(
        ("make_optimizer", "options"),
        [(adam, {}), (adam, {"norm": "l1"}), (sgd, {"normalizer": "none"})],
        ids=["l2", "l1", "sgd"],
    )
    def test_bit_exact(self, tmp_path, epoch, make_optimizer, options):
        unbroken = Tiny(make_optimizer)
        start = weights(unbroken)
        fit(unbroken, AdamRCallback(0.5, **options), epochs=4)
        resumed, trainer = crash_and_resume(tmp_path, epoch, make_optimizer, **options)
        for name, param in resumed.named_parameters():
            assert torch.equal(param, weights(unbroken)[name]), name
        state = trainer.optimizers[0].state
        for name, param in resumed.named_parameters():
            assert (BASE_KEY in state.get(param, {})) == (name in MATRICES)
            if name in MATRICES:
                assert torch.equal(state[param][BASE_KEY], start[name])

    def test_clamped_steps_go_on(self, tmp_path):
        callback = AdamRCallback(1e6)
        crash_and_resume(tmp_path, 1, before=[AdamRCallback(1e6)], after=[callback])
        assert callback.clamped_steps == 32

    def test_checkpoint_is_plain_and_carries_a_mark(self, tmp_path):
        module = Tiny()
        saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
        fit(module, AdamRCallback(0.5), saver, epochs=1)
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert set(checkpoint["state_dict"]) == set(Tiny().state_dict())
        marks = [state for key, state in checkpoint["callbacks"].items() if key.startswith("AdamRCallback")]
        assert marks == [{"strength": 0.5, "norm": "l2", "normalizer": "stable", "clamped_steps": 0}]

    @pytest.mark.parametrize("make_optimizer", [adam, sgd])
    def test_checkpoint_without_base(self, tmp_path, make_optimizer):
        with pytest.raises(InputError, match=r"no base for 'body\.0\.weight'.*Start from the base model"):
            crash_and_resume(tmp_path, 1, make_optimizer, before=[])

    @pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*")
    @pytest.mark.filterwarnings("ignore:AdamRCallback goes on with")
    @pytest.mark.parametrize(
        "first", [{"include": ["body.0.*"], "strength": 0.5}, {"strength": 0.0}], ids=["patterns", "zero"]
    )
    def test_checkpoint_without_a_base_for_all(self, tmp_path, first):
        with pytest.raises(InputError, match=r"no base for 'body\.\d\.weight'"):
            crash_and_resume(tmp_path, 1, before=[AdamRCallback(**first)])

    def test_changed_settings_are_named(self, tmp_path):
        with pytest.warns(UserWarning, match=r"`strength=0\.25`, but the checkpoint was written with 0\.5"):
            crash_and_resume(tmp_path, 1, after=[AdamRCallback(0.25)])

    def test_unbegun_parameters_get_their_base_on_resume(self, tmp_path):
        class Late(Tiny):
            def training_step(self, batch, batch_idx):
                if self.current_epoch < 2:
                    return self.body[0](batch[0]).square().mean()
                return super().training_step(batch, batch_idx)

        saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
        with pytest.raises(RuntimeError, match="crash"):
            fit(Late(), AdamRCallback(1e6), saver, Crash(1), epochs=4)
        module = Late()
        start = weights(module)
        saver = ModelCheckpoint(dirpath=tmp_path, save_last=True)
        fit(module, AdamRCallback(1e6), saver, epochs=4, ckpt_path=tmp_path / "last.ckpt")
        assert torch.equal(module.body[2].weight, start["body.2.weight"])


class TestLogs:
    def test_once_per_epoch(self):
        module = Tiny()
        start = weights(module)
        trainer = fit(module, AdamRCallback(0.5))
        delta = torch.cat([(weights(module)[name] - start[name]).flatten() for name in MATRICES]).norm()
        base = torch.cat([start[name].flatten() for name in MATRICES]).norm()
        assert trainer.callback_metrics["adamr/delta_norm"].item() == pytest.approx((delta / base).item(), rel=1e-5)
        assert trainer.callback_metrics["adamr/clamped_steps"].item() == 0

    def test_clamped_steps(self):
        trainer = fit(Tiny(), AdamRCallback(1e6))
        assert trainer.callback_metrics["adamr/clamped_steps"].item() == 16
        assert trainer.callback_metrics["adamr/delta_norm"].item() == 0

    def test_warns_once_of_weight_decay(self):
        def adamw(module):
            return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.01)

        with pytest.warns(UserWarning, match="`weight_decay` pulls 2 parameters toward zero") as caught:
            fit(Tiny(adamw), AdamRCallback(0.5))
        assert sum("weight_decay" in str(warning.message) for warning in caught) == 1

    def test_weight_decay_of_other_parameters_is_fine(self):
        def split(module):
            pulled = [param for name, param in module.named_parameters() if name in MATRICES]
            others = [param for name, param in module.named_parameters() if name not in MATRICES]
            return torch.optim.AdamW([{"params": pulled, "weight_decay": 0.0}, {"params": others}], lr=0.01)

        fit(Tiny(split), AdamRCallback(0.5))

    def test_warns_of_low_precision(self):
        with pytest.warns(UserWarning, match="2 parameters kept in 16 bits"):
            fit(Tiny(), AdamRCallback(0.5), precision="bf16-true")

    def test_bf16_mixed_is_fine(self):
        fit(Tiny(), AdamRCallback(0.5), precision="bf16-mixed")


class TestRefused:
    @pytest.mark.parametrize("name", ["DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy"])
    def test_strategies(self, name):
        strategy = object.__new__(getattr(pl.strategies, name))  # their constructors need packages or devices
        trainer = SimpleNamespace(strategy=strategy)
        with pytest.raises(DtrainError, match=rf"does not work with {name}.*strategy='ddp'"):
            AdamRCallback(0.5).setup(trainer, Tiny(), "fit")
        AdamRCallback(0.5).setup(trainer, Tiny(), "validate")

    def test_adamr_as_the_optimizer(self):
        with pytest.raises(InputError, match="pulled twice"):
            fit(Tiny(lambda module: AdamR(module.parameters(), strength=0.1)), AdamRCallback(0.5))

    def test_stable_without_second_moment(self):
        with pytest.raises(InputError, match=r"keeps `exp_avg_sq`, and SGD does not\. Use `normalizer='none'`"):
            fit(Tiny(sgd), AdamRCallback(0.5))

    def test_patterns_that_leave_nothing(self):
        with pytest.raises(InputError, match="no matrix to pull"):
            fit(Tiny(), AdamRCallback(0.5, include=["encoder.*"]))

    def test_group_added_within_a_batch(self):
        class Hasty(Tiny):
            def training_step(self, batch, batch_idx):
                if batch_idx == 1:
                    self.optimizers().optimizer.add_param_group({"params": self.body.parameters()})
                return super().training_step(batch, batch_idx)

        with pytest.raises(InputError, match="given to the optimizer within a batch"):
            fit(Hasty(lambda module: torch.optim.Adam(module.head.parameters())), AdamRCallback(0.5))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"strength": -1}, "`strength` must be"),
            ({"strength": 0.1, "norm": "l3"}, "`norm` must be"),
            ({"strength": 0.1, "normalizer": "batch"}, "`normalizer` must be"),
            ({"strength": 0.1, "include": "body.*"}, "`include` must be a list"),
        ],
    )
    def test_settings(self, options, message):
        with pytest.raises(InputError, match=message):
            AdamRCallback(**options)


def test_command_line(tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_subclass_arguments(Callback, "callback")
    given = ["--callback=dtrain.callbacks.adamr.AdamRCallback", "--callback.strength=0.5", "--callback.norm=l1"]
    config = parser.parse_args([*given, "--callback.exclude=[body.2.*]"])
    again = parser.parse_string(parser.dump(config))
    callback = parser.instantiate(again).callback
    assert callback._settings() == {"strength": 0.5, "norm": "l1", "normalizer": "stable"}
    assert callback.exclude == ["body.2.*"]


def test_skipped_step_of_a_fused_optimizer_pulls_nothing():
    param = nn.Parameter(torch.ones(3, 3))
    optimizer = torch.optim.Adam([param], lr=0.01, fused=True)
    module = pl.LightningModule()
    module.matrix = param
    callback = AdamRCallback(0.5)
    callback.on_train_start(SimpleNamespace(optimizers=[optimizer]), module)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for grad in (float("inf"), 1.0):
        param.grad = torch.full_like(param, grad)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(param, torch.ones(3, 3)) == (grad == float("inf"))
    assert param.isfinite().all()
    callback.on_train_end(SimpleNamespace(optimizers=[optimizer]), module)


@pytest.mark.multiproc
def test_two_processes_do_what_one_does():
    # One batch an epoch, all rows in it: Lightning's distributed sampler shuffles.
    alone, together, free = Tiny(), Tiny(), Tiny()
    trainer = fit(alone, AdamRCallback(0.5), batch_size=32, epochs=8)
    fit(free, batch_size=32, epochs=8)
    spread = fit(together, AdamRCallback(0.5), batch_size=16, epochs=8, strategy="ddp_spawn", devices=2)
    for name, param in together.named_parameters():
        torch.testing.assert_close(param.detach(), weights(alone)[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together.body[0].weight, free.body[0].weight, atol=1e-3)
    for name in ("adamr/delta_norm", "adamr/clamped_steps"):
        torch.testing.assert_close(spread.callback_metrics[name], trainer.callback_metrics[name], rtol=1e-4, atol=1e-6)
