"""The base of a run: found again after a crash, never mistaken for another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file, save_file
from torch import nn

import dtrain
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback
from dtrain.callbacks.base import CHECKPOINT_KEY
from dtrain.errors import BaseMismatchError, InputError
from tests.callbacks.models import (
    QUIET,
    Classifier,
    Crash,
    Net,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

pytestmark = [
    *QUIET,
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

DARE = dtrain.Dare(keep=0.5)
SEARCH = dtrain.DareX(keep=0.5, masks=1, search="golden")


def compress(folder, method=DARE, **options):
    return DeltaCompressionCallback(method, folder / "delta.safetensors", **options)


def saver(folder):
    return ModelCheckpoint(dirpath=folder, save_last=True)


def crash(folder, callback, epoch=1, module=None, **options):
    with pytest.raises(RuntimeError, match="crash"):
        fit(module or Classifier(), folder, *callback, saver(folder), Crash(epoch), epochs=4, **options)


def shaken():
    """Return a module as a fresh process would have it, at other weights than those of the first."""
    module = Classifier()
    with torch.no_grad():
        for param in module.parameters():
            param.add_(1)
    return module


def resume(folder, *callbacks, module=None, source=None, **options):
    module = module or shaken()
    fit(module, folder, *callbacks, saver(folder), epochs=4, ckpt_path=(source or folder) / "last.ckpt", **options)
    return module


def snapshots(folder):
    return sorted(Path(folder).rglob("dtrain-base-*"))


class TestResume:
    @pytest.mark.parametrize("epoch", [1, 3])
    @pytest.mark.parametrize("method", [DARE, SEARCH], ids=["dare", "search"])
    @pytest.mark.parametrize("part", ["", "model"])
    def test_the_file_is_that_of_an_unbroken_run(self, tmp_path, epoch, method, part):
        one, other = tmp_path / "one", tmp_path / "other"
        fit(Classifier(), one, compress(one, method, module=part), saver(one), epochs=4)
        crash(other, [compress(other, method, module=part)], epoch)
        resume(other, compress(other, method, module=part))
        assert (one / "delta.safetensors").read_bytes() == (other / "delta.safetensors").read_bytes()

    def test_with_adamr(self, tmp_path):
        one, other = tmp_path / "one", tmp_path / "other"
        fit(Classifier(), one, AdamRCallback(0.1), compress(one), saver(one), epochs=4)
        crash(other, [AdamRCallback(0.1), compress(other)])
        resume(other, AdamRCallback(0.1), compress(other))
        assert (one / "delta.safetensors").read_bytes() == (other / "delta.safetensors").read_bytes()

    def test_into_another_folder_and_again(self, tmp_path):
        """Every resume leaves the snapshot beside its own checkpoints: the first folder may be cleaned up."""
        a, b = tmp_path / "a", tmp_path / "b"
        crash(a, [compress(tmp_path)])
        with pytest.raises(RuntimeError, match="crash"):
            resume(b, compress(tmp_path), Crash(2), source=a)
        for path in snapshots(a):
            path.unlink()
        resume(b, compress(tmp_path))
        dtrain.load(tmp_path / "delta.safetensors").verify(Classifier())

    def test_default_folders_of_a_logger(self, tmp_path):
        def run(*more, **options):
            logger = CSVLogger(tmp_path)
            return fit(
                shaken() if options else Classifier(),
                tmp_path,
                compress(tmp_path),
                ModelCheckpoint(save_last=True),
                *more,
                epochs=4,
                logger=logger,
                **options,
            )

        with pytest.raises(RuntimeError, match="crash"):
            run(Crash(1))
        (last,) = tmp_path.rglob("last.ckpt")
        run(ckpt_path=last)
        assert [path.parent.parent.name for path in snapshots(tmp_path)] == ["version_0", "version_1"]
        dtrain.load(tmp_path / "delta.safetensors").verify(Classifier())

    def test_output_path_may_change(self, tmp_path):
        crash(tmp_path, [compress(tmp_path)])
        resume(tmp_path, DeltaCompressionCallback(SEARCH, tmp_path / "other.safetensors"))
        dtrain.load(tmp_path / "other.safetensors").verify(Classifier())

    def test_snapshot_is_gone(self, tmp_path):
        crash(tmp_path, [compress(tmp_path)])
        snapshots(tmp_path)[0].unlink()
        last = torch.load(tmp_path / "last.ckpt")["state_dict"]
        module = shaken()
        with pytest.raises(InputError, match=r"dtrain-base-\w+\.safetensors, is neither in .*base=") as error:
            resume(tmp_path, compress(tmp_path), module=module)
        assert str(tmp_path) in str(error.value)
        assert same(state(module), last)  # not one step further

    def test_snapshot_was_changed(self, tmp_path):
        crash(tmp_path, [compress(tmp_path)])
        (path,) = snapshots(tmp_path)
        tensors = load_file(path)
        tensors["model.body.bias"][0] += 1
        save_file(tensors, path)
        with pytest.raises(BaseMismatchError, match="not the base that this run started from"):
            resume(tmp_path, compress(tmp_path))

    def test_lost_snapshot_is_replaced_by_a_path(self, tmp_path):
        crash(tmp_path, [compress(tmp_path)])
        snapshots(tmp_path)[0].unlink()
        save_file(Classifier().state_dict(), tmp_path / "base.safetensors")
        resume(tmp_path, compress(tmp_path, base=tmp_path / "base.safetensors"))
        dtrain.load(tmp_path / "delta.safetensors").verify(Classifier())

    def test_checkpoint_of_a_run_without_us(self, tmp_path):
        crash(tmp_path, [])
        with pytest.raises(InputError, match=r"begun without DeltaCompressionCallback\(module=''\).*base="):
            resume(tmp_path, compress(tmp_path))

    def test_checkpoint_of_a_run_for_another_part(self, tmp_path):
        crash(tmp_path, [compress(tmp_path)])
        with pytest.raises(InputError, match=r"begun without DeltaCompressionCallback\(module='model'\)"):
            resume(tmp_path, compress(tmp_path, module="model"))

    def test_the_learning_rate_finder_is_no_resume(self, tmp_path):
        """It saves a checkpoint before the first step and restores it."""
        finder = LearningRateFinder(num_training_steps=3, update_attr=False)
        callback = compress(tmp_path)
        fit(Classifier(), tmp_path, callback, finder, saver(tmp_path))
        callback.delta.verify(Classifier())

    def test_nothing_is_taken_after_the_first_step(self, tmp_path):
        module, callback = Classifier(), compress(tmp_path)
        trainer = fit(module, tmp_path, callback, saver(tmp_path))
        before = snapshots(tmp_path)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(module, train_loader(), val_loader())
        assert snapshots(tmp_path) == before


class TestSnapshot:
    def test_one_file_for_runs_of_one_base(self, tmp_path):
        for epochs in (1, 2):
            fit(Classifier(), tmp_path, compress(tmp_path), epochs=epochs)
        assert len(snapshots(tmp_path)) == 1
        fit(shaken(), tmp_path, compress(tmp_path))
        assert len(snapshots(tmp_path)) == 2

    def test_is_a_file_of_weights(self, tmp_path):
        fit(Classifier(), tmp_path, compress(tmp_path), saver(tmp_path / "checkpoints"))
        (path,) = snapshots(tmp_path)
        assert path.parent == tmp_path / "checkpoints"
        assert same(load_file(path), state(Classifier()))
        name, sha256 = torch.load(path.parent / "last.ckpt")[CHECKPOINT_KEY][""]["snapshot"]
        assert path.name == name == f"dtrain-base-{sha256[:12]}.safetensors"

    @pytest.mark.parametrize("damage", [b"", b"nothing", None], ids=["empty", "other", "changed"])
    def test_a_damaged_file_of_that_name_is_replaced(self, tmp_path, damage):
        fit(Classifier(), tmp_path, compress(tmp_path))
        (path,) = snapshots(tmp_path)
        good = path.read_bytes()
        path.write_bytes(good[:-1] + b"\x77" if damage is None else damage)
        callback = compress(tmp_path)
        fit(Classifier(), tmp_path, callback)
        assert path.read_bytes() == good
        callback.delta.verify(Classifier())

    def test_two_callbacks_share_it(self, tmp_path):
        dare = DeltaCompressionCallback(DARE, tmp_path / "dare.safetensors", module="model")
        norm = DeltaCompressionCallback(dtrain.DareX(q="norm"), tmp_path / "norm.safetensors", module="model")
        fit(Classifier(), tmp_path, dare, norm, compress(tmp_path))
        assert len(snapshots(tmp_path)) == 2  # the part, and the whole
        assert len(list(tmp_path.glob("*.safetensors"))) == 5

    def test_tied_weights(self, tmp_path):
        class Tied(Classifier):
            def __init__(self):
                super().__init__()
                self.alias = nn.Linear(16, 16, bias=False)
                self.alias.weight = self.model.inner.weight

        callback = compress(tmp_path)
        fit(Tied(), tmp_path, callback)
        assert "model.inner.weight" not in load_file(snapshots(tmp_path)[0])
        callback.delta.verify(Tied())

    def test_remote_checkpoints(self, tmp_path):
        checkpoints = ModelCheckpoint(dirpath="memory://bucket/run")
        with pytest.raises(InputError, match=r"go to memory://bucket/run.*base="):
            fit(Classifier(), tmp_path, compress(tmp_path), checkpoints)
        save_file(Classifier().state_dict(), tmp_path / "base.safetensors")
        callback = compress(tmp_path, base=tmp_path / "base.safetensors")
        fit(Classifier(), tmp_path, callback, checkpoints)
        assert callback.outcome.path.exists()

    def test_a_weights_only_checkpoint_has_no_note(self, tmp_path):
        fit(Classifier(), tmp_path, compress(tmp_path), ModelCheckpoint(dirpath=tmp_path, save_weights_only=True))
        (path,) = tmp_path.glob("*.ckpt")
        assert CHECKPOINT_KEY not in torch.load(path)


class TestPath:
    """`base=` names the weights that the fine-tuning starts from."""

    def whole(self, path):
        save_file(Classifier().state_dict(), path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")

    def part(self, path):
        save_file(Classifier().model.state_dict(), path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")

    def checkpoint(self, path):
        trainer = make_trainer(path.parent)
        trainer.strategy.connect(Classifier())
        trainer.save_checkpoint(path.with_suffix(".ckpt"), weights_only=True)
        return path.with_suffix(".ckpt")

    @pytest.mark.parametrize(
        ("make", "part"),
        [(whole, ""), (checkpoint, ""), (part, "model"), (checkpoint, "model"), (whole, "model")],
        ids=["whole", "checkpoint", "part", "checkpoint of a part", "whole of a part"],
    )
    def test_takes_any_form(self, tmp_path, make, part):
        callback = compress(tmp_path, SEARCH, base=make(self, tmp_path / "base"), module=part)
        plain = compress(tmp_path / "plain", SEARCH, module=part)
        fit(Classifier(), tmp_path, callback)
        fit(Classifier(), tmp_path / "plain", plain)
        assert not list(tmp_path.glob("dtrain-base-*"))
        assert callback.outcome.path.read_bytes() == plain.outcome.path.read_bytes()
        assert callback.outcome.scores == plain.outcome.scores

    def test_a_base_without_the_head(self, tmp_path):
        torch.manual_seed(0)
        tensors = {name: tensor for name, tensor in Net().state_dict().items() if "head" not in name}
        save_file(tensors, tmp_path / "base.safetensors")
        callback = compress(tmp_path, SEARCH, base=tmp_path / "base.safetensors", module="model")
        trainer = fit(Classifier(), tmp_path, callback)
        assert callback.outcome.report.whole == ("head.bias", "head.weight")
        assert callback.outcome.scores["finetuned"]["val_loss"] == float(trainer.callback_metrics["val_loss"])

    def test_without_metric_states_of_the_module(self, tmp_path):
        class Persistent(Classifier):
            def __init__(self):
                super().__init__()
                self.val_acc.persistent(True)

        callback = compress(tmp_path, SEARCH, base=self.whole(tmp_path / "base"))
        fit(Persistent(), tmp_path, callback)
        callback.delta.apply_(Classifier())

    def test_missing_file(self, tmp_path):
        module = Classifier()
        with pytest.raises(InputError, match=r"base\.ckpt does not exist"):
            fit(module, tmp_path, compress(tmp_path, base=tmp_path / "base.ckpt"))
        assert same(state(module), state(Classifier()))

    def test_of_a_submodule(self, tmp_path):
        with pytest.raises(InputError, match=r"no tensor of the module by name: 'body.bias' there.*module='model'"):
            fit(Classifier(), tmp_path, compress(tmp_path, base=self.part(tmp_path / "base")))

    def test_of_another_model(self, tmp_path):
        save_file({"foreign": torch.zeros(3)}, tmp_path / "base.safetensors")
        with pytest.raises(InputError, match=r"no tensor of the module by name.*Give the weights of this model"):
            fit(Classifier(), tmp_path, compress(tmp_path, base=tmp_path / "base.safetensors"))

    def one_bit(self, state):
        bits = state["model.body.weight"].view(torch.int32)
        bits[0, 0] ^= 1
        return state

    CHANGES = (
        one_bit,
        lambda self, state: {name: tensor for name, tensor in state.items() if name != "model.body.bias"},
        lambda self, state: state | {"model.extra": torch.zeros(1)},
        lambda self, state: {name.replace("body.bias", "body.shift"): tensor for name, tensor in state.items()},
        lambda self, state: state | {"model.body.bias": state["model.body.bias"].double()},
        lambda self, state: state | {"model.body.bias": state["model.body.bias"].view(4, 4)},
    )

    @pytest.mark.parametrize("change", CHANGES, ids=["one bit", "missing", "extra", "renamed", "dtype", "shape"])
    def test_a_changed_one_on_resume(self, tmp_path, change):
        base = self.whole(tmp_path / "base")
        crash(tmp_path, [compress(tmp_path, base=base)])
        save_file(change(self, load_file(base)), tmp_path / "other.safetensors")
        module = shaken()
        with pytest.raises(InputError, match=r"begun with another base than .*other\.safetensors.*Resume it with the"):
            resume(tmp_path, compress(tmp_path, base=tmp_path / "other.safetensors"), module=module)
        assert not (tmp_path / "delta.safetensors").exists()

    def test_another_one_on_resume(self, tmp_path):
        base = self.whole(tmp_path / "base")
        crash(tmp_path, [compress(tmp_path, base=base)])
        save_file(shaken().state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(InputError, match=r"begun with another base than .*other\.safetensors"):
            resume(tmp_path, compress(tmp_path, base=tmp_path / "other.safetensors"))
        with pytest.raises(InputError, match="begun with a `base`, so there is no snapshot"):
            resume(tmp_path, compress(tmp_path))
        moved = base.rename(tmp_path / "moved.safetensors")
        resume(tmp_path, compress(tmp_path, base=moved))
        dtrain.load(tmp_path / "delta.safetensors").verify(Classifier())
