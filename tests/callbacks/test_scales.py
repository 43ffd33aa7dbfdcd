"""DeltaCompressionCallback with a fit: what is replayed, what is learnt, logged and refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from dtrain.callbacks.objective import ValidationObjective, calibration_loader
from dtrain.callbacks.replay import record
from dtrain.errors import InputError
from tests.callbacks.models import (
    CLASSES,
    FEATURES,
    QUIET,
    SEARCH,
    Classifier,
    Memory,
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

LEARN = dtrain.Learn(steps=6, every=2)
SIGN = dtrain.SeededSign(keep=0.25)
DBMS = dtrain.Dbms(host=dtrain.DareX(keep=0.5))


class Inner(Classifier):
    """Does not call itself, but its model, and a frozen teacher beside it."""

    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.loss = nn.CrossEntropyLoss()

    def validation_step(self, batch, batch_idx):
        logits = self.model(batch[0])
        self.val_acc(logits, batch[1])
        self.outputs.append(logits)
        self.log("val_acc", self.val_acc)
        self.log("val_loss", self.loss(logits, self.teacher(batch[0]).argmax(1)))


class Chained(Classifier):
    """Calls its body and then its head."""

    def __init__(self):
        super().__init__()
        self.model, self.top = nn.Linear(FEATURES, 16), nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.top(self.model(x).tanh())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", cross_entropy(Chained.forward(self, batch[0]), batch[1]))

    def on_validation_epoch_end(self):
        pass


class Named(Classifier):
    """Calls its model by keyword, with a mask of padding and noise that is drawn while it runs."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.out = nn.Linear(FEATURES, 8), nn.Linear(8, CLASSES)

        def forward(self, x, attention_mask):
            return SimpleNamespace(logits=self.out(self.body(x + torch.rand(()))))

    def __init__(self):
        super().__init__()
        self.model = self.Tokens()

    def forward(self, x):
        return self.model(x=x[:, None].expand(-1, 2, -1), attention_mask=torch.tensor([[1, 0]] * len(x))).logits[:, 0]


def inside(look, folder, module):
    """Return what `look(trainer, module)` returns when training ends."""

    class Inside(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            self.found = look(trainer, pl_module)

    callback = Inside()
    fit(module, folder, callback, epochs=1)
    return callback.found


def recorded(folder, module, part=""):
    def look(trainer, module):
        loader = calibration_loader(trainer, module)
        return record(trainer, module, module.get_submodule(part), loader, 2)

    return inside(look, folder, module)


class TestReplay:
    @pytest.mark.parametrize(("make", "part"), [(Classifier, ""), (Classifier, "model"), (Inner, ""), (Inner, "model")])
    def test_one_call_a_batch(self, tmp_path, make, part):
        module = make()
        replay = recorded(tmp_path, module, part)
        assert [call[0][0].shape for call in replay.calls] == [(16, FEATURES)] * 2
        module.eval()
        assert torch.equal(replay.forward(module, replay.calls[0]), module.model(replay.calls[0][0][0]))

    def test_arguments_by_keyword_are_a_batch_with_padding(self, tmp_path):
        replay = recorded(tmp_path, Named(), "model")
        assert [sorted(call) for call in replay.calls] == [["attention_mask", "x"]] * 2

    def test_the_same_random_numbers_each_time(self, tmp_path):
        module = Named()
        replay = recorded(tmp_path, module, "model")
        before = torch.get_rng_state()
        one, other = (replay.forward(module, replay.calls[0]).logits for _ in range(2))
        assert torch.equal(one, other)
        assert torch.equal(torch.get_rng_state(), before)

    def test_one_part_after_the_other(self, tmp_path):
        assert recorded(tmp_path, Chained()) is None
        assert len(recorded(tmp_path, Chained(), "model").calls) == 2

    def test_what_is_never_called(self, tmp_path):
        module = Inner()
        module.spare = nn.Linear(2, 2)
        assert recorded(tmp_path, module, "spare") is None

    def test_compiled(self, tmp_path):
        module = Classifier()
        module.model = torch.compile(module.model, backend="eager")
        for part in ("", "model"):
            assert len(recorded(tmp_path, module, part).calls) == 2

    def test_no_hook_stays_and_inputs_are_copies(self, tmp_path):
        module = Classifier()
        replay = recorded(tmp_path, module)
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in module.modules())
        assert not any(call[0][0].is_inference() for call in replay.calls)

    def test_the_loss_is_that_of_the_whole_step(self, tmp_path):
        def look(trainer, module):
            loader, losses = calibration_loader(trainer, module), []
            replayed = dtrain.HiddenChange(module.model, *record(trainer, module, module.model, loader, 3))
            for objective in (replayed, ValidationObjective(trainer, module, module.model, loader, 3)):
                before = state(module.model)
                objective.remember()
                with torch.no_grad():
                    module.model.inner.weight.mul_(1.1)
                    module.model.body.weight.mul_(1.1)
                losses.append(objective.loss())
                module.model.load_state_dict(before)
            return losses

        one, other = inside(look, tmp_path, Classifier())
        assert one == pytest.approx(other, rel=1e-6)
        assert one > 0

    def test_precision_of_the_run(self, tmp_path):
        kinds = []

        class Notes(Classifier):
            def forward(self, x):
                out = super().forward(x)
                kinds.append((out.dtype, torch.is_grad_enabled()))
                return out

        fit(Notes(), tmp_path, compress(method=SIGN, fit=LEARN), precision="bf16-mixed")
        assert (torch.bfloat16, True) in kinds[-40:]
        assert {dtype for dtype, _ in kinds} == {torch.bfloat16}


class TestLearn:
    @pytest.mark.parametrize("method", [SIGN, DBMS, dtrain.BitDelta()], ids=lambda method: type(method).__name__)
    @pytest.mark.parametrize("fit_on", ["hidden", "logits"])
    def test_the_loss_falls_and_is_logged(self, tmp_path, method, fit_on):
        memory, callback = Memory(), compress(method=method, fit=dtrain.Learn(), fit_on=fit_on, monitor="val_loss")
        fit(Classifier(), tmp_path, callback, logger=memory)
        found = callback.delta.content.metadata["fit"]
        assert found["name"] == "Learn"
        assert found["objective"] == {"hidden": "hidden change", "logits": "logit mse"}[fit_on]
        assert found["loss"] < found["start"]
        losses = [(step, values["dtrain/fit_loss"]) for step, values in memory.values if "dtrain/fit_loss" in values]
        assert [step for step, _ in losses] == [*range(7, 6 + len(losses)), 6]
        assert losses[0][1] == found["start"] == memory.values[-1][1]["dtrain/fit_start"]
        assert losses[-2][1] == losses[-1][1] == found["loss"]
        assert len(losses) == found["steps"] + 3

    @pytest.mark.parametrize("per", ["model", "row"])
    def test_other_scales(self, tmp_path, per):
        callback = compress(method=SIGN, fit=dtrain.Learn(per=per, steps=6, every=2), module="model")
        fit(Inner(), tmp_path, callback)
        found = callback.delta.content.metadata["fit"]
        assert found["loss"] <= found["start"]
        dtrain.load(callback.outcome.path).apply_(Inner().model)

    def test_padding_is_left_out(self, tmp_path):
        losses = []
        for mask in (1, 0):

            class Masked(Named):
                def forward(self, x, mask=mask):
                    x = torch.stack([x, 10 * x], 1)
                    return self.model(x=x, attention_mask=torch.tensor([[1, mask]] * len(x))).logits[:, 0]

            callback = compress(method=SIGN, fit=LEARN, module="model", fit_on="logits")
            fit(Masked(), tmp_path, callback)
            losses.append(callback.delta.content.metadata["fit"]["start"])
        assert losses[0] > 2 * losses[1]

    def test_repeatable_and_resumed(self, tmp_path):
        def run(name, **options):
            callback = compress(tmp_path / name, method=DBMS, fit=LEARN)
            fit(Classifier(), tmp_path, callback, checkpoints(tmp_path / "c", save_top_k=-1), epochs=3, **options)
            return callback.outcome.path.read_bytes()

        whole = run("one")
        assert run("two") == whole
        assert run("three", ckpt_path=next((tmp_path / "c").glob("epoch=0*.ckpt"))) == whole

    @pytest.mark.filterwarnings("ignore:Found 1 module")
    def test_the_run_is_the_run_without(self, tmp_path):
        class Last(pl.Callback):
            def on_train_end(self, trainer, pl_module):
                grads = {name: param.grad for name, param in pl_module.named_parameters()}
                self.seen = [*getattr(self, "seen", []), (state(pl_module), grads, torch.get_rng_state())]
                self.modes = [part.training for part in pl_module.modules()]

        last, after, module = Last(), Last(), Classifier()
        module.model.norm.eval()
        fit(module, tmp_path, last, compress(method=DBMS, fit=LEARN), after)
        assert same(last.seen[0][0], after.seen[0][0])
        assert all(one is other for one, other in zip(last.seen[0][1].values(), after.seen[0][1].values(), strict=True))
        assert torch.equal(last.seen[0][2], after.seen[0][2])
        assert last.modes == after.modes

    @pytest.mark.parametrize("options", [{"fit": LEARN}, {"fit_on": "logits"}], ids=["learn", "logits"])
    def test_nothing_to_call_again(self, tmp_path, options):
        with pytest.raises(InputError, match=r"calls no part of Chained, or several one after the other.*module="):
            fit(Chained(), tmp_path, compress(**{"method": SEARCH, **options}))

    def test_a_search_runs_the_step_itself(self, tmp_path):
        callback = compress(method=SEARCH)
        fit(Chained(), tmp_path, callback)
        assert callback.delta.content.metadata["fit"]["objective"] == "hidden change"

    def test_a_part_of_what_is_called_one_after_the_other(self, tmp_path):
        callback = compress(method=SIGN, fit=LEARN, module="model", fit_on="logits", whole=())
        fit(Chained(), tmp_path, callback)
        assert callback.delta.content.metadata["fit"]["loss"] <= callback.delta.content.metadata["fit"]["start"]


class TestOtherFits:
    def test_a_metric_is_searched(self, tmp_path):
        callback = compress(
            method=SIGN, fit=dtrain.Search(scan="golden"), fit_on="metric", monitor="val_loss", mode="min"
        )
        fit(Classifier(), tmp_path, callback)
        assert callback.delta.content.metadata["fit"]["objective"] == "val_loss on training batches"

    def test_a_closed_form_needs_nothing(self, tmp_path):
        class Bare(Classifier):
            validation_step = pl.LightningModule.validation_step

            def on_validation_epoch_end(self):
                pass

        callback = compress(method=SIGN, fit=dtrain.ClosedForm("mse"))
        with pytest.warns(UserWarning, match="no validation data"):
            fit(Bare(), tmp_path, callback, val=())
        assert callback.delta.content.metadata["fit"]["rule"] == "mse"
        assert callback.outcome.fitted is None

    def test_a_closed_form_that_looks_at_inputs(self, tmp_path, monkeypatch):
        callback = compress(method=SIGN, fit=dtrain.ClosedForm("gram"))
        fit(Classifier(), tmp_path, callback)
        assert callback.delta.content.metadata["uncalibrated"] == []
        trainer = make_trainer(tmp_path, callback)
        monkeypatch.setattr(type(trainer), "world_size", property(lambda _: 2))
        with pytest.raises(InputError, match=r"ClosedForm measures the inputs of layers, .* the 2 processes"):
            trainer.fit(Classifier(), train_loader(), val_loader())


class TestShared:
    def family(self, folder):
        """Return the file of a base vector that two fine-tunes share."""
        tuned = []
        for seed in (1, 2):
            module = Classifier()
            fit(module, folder, train=DataLoader(dataset(seed=seed), batch_size=16))
            tuned.append(module.model)
        dtrain.shared_base(Classifier().model, tuned, dtrain.DareX(keep=0.5, q="keep")).save(
            folder / "family.safetensors"
        )
        return folder / "family.safetensors"

    def test_one_file_for_the_family(self, tmp_path):
        shared, memory = self.family(tmp_path), Memory()
        method = dtrain.Dbms(host=SIGN, source="shared")
        callback = compress(tmp_path / "task.safetensors", method=method, fit=LEARN, module="model", shared=shared)
        fit(Classifier(), tmp_path, callback, logger=memory)
        plain = Classifier().model
        dtrain.load(callback.outcome.path).apply_(plain)  # finds the family's file beside it
        looks = [values for _, values in memory.values if "dtrain/projected_bytes" in values]
        assert len(looks) == 2
        note = json.dumps(json.dumps({"fit": callback.delta.content.metadata["fit"]}, separators=(",", ":")))
        without = callback.outcome.report.file_bytes - len(note)  # what the file says of a fit is not projected
        assert looks[-1]["dtrain/projected_bytes"] == pytest.approx(without, abs=32)

    def test_a_missing_file_is_noticed_before_the_first_step(self, tmp_path):
        module = Classifier()
        before = state(module)
        with pytest.raises(dtrain.ArtifactError, match=r"none\.safetensors"):
            fit(module, tmp_path, compress(method=dtrain.Dbms(source="shared"), shared=tmp_path / "none.safetensors"))
        assert same(state(module), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": LEARN, "fit_on": "metric"}, "a metric has none"),
        ({"fit": LEARN, "calibration_batches": 1}, "calibration_batches=2 or more"),
        ({"fit": LEARN, "method": dtrain.Lossless()}, "Lossless has no scales to fit"),
        ({"method": dtrain.Dbms(source="shared")}, "got no base vector"),
    ],
)
def test_settings(options, message):
    with pytest.raises(InputError, match=message):
        DeltaCompressionCallback(**{"method": SIGN, **options})


def test_inputs_of_the_module_come_in_once(tmp_path):
    class Calibrated(Classifier):
        asked = 0

        def calibration_dataloader(self):
            self.asked += 1
            return DataLoader(dataset(rows=24, seed=7), batch_size=8)

    module = Calibrated()
    fit(module, tmp_path, compress(method=SIGN, fit=LEARN))
    assert module.asked == 1
