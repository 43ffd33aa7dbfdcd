"""A run that is over, compressed once more without training."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback, compress_finished
from dtrain.errors import InputError
from tests.callbacks.models import (
    QUIET,
    SEARCH,
    Classifier,
    Memory,
    checkpoints,
    compress,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

# Most of these runs are compressed without the callback that saved their checkpoints, which Lightning remarks on.
pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")]


def again(module, folder, callback, *others, checkpoint="last.ckpt", **options):
    trainer = make_trainer(folder, callback, *others, **options)
    path = None if checkpoint is None else folder / checkpoint
    compress_finished(trainer, module, path, train_dataloaders=train_loader(), val_dataloaders=val_loader())
    return trainer


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    """The callback of a run that is over, with its last checkpoint and its snapshot in `tmp_path`."""
    callback = DeltaCompressionCallback(SEARCH, tmp_path / "delta.safetensors", monitor="val_acc")
    fit(Classifier(), tmp_path, callback, checkpoints(tmp_path, save_last=True))
    return callback


@pytest.mark.parametrize(
    "options",
    [{}, {"epochs": 1}, {"max_steps": 2}, {"epochs": 9, "min_epochs": 9}, {"check_val_every_n_epoch": 5}],
    ids=["as it was", "epochs", "steps", "more epochs", "rare validation"],
)
def test_the_same_settings_give_the_same_file_and_scores(tmp_path, finished, options):
    before = files(tmp_path)
    callback = DeltaCompressionCallback(SEARCH, tmp_path / "again" / "delta.safetensors", monitor="val_acc")
    trainer = again(Classifier(), tmp_path, callback, **options)
    assert callback.outcome.path.read_bytes() == before[tmp_path / "delta.safetensors"]
    assert callback.outcome.scores == finished.outcome.scores
    assert trainer.global_step == 6
    kept = files(tmp_path)
    assert {path: kept[path] for path in before} == before


def test_the_checkpoints_of_the_run_stay(tmp_path, finished):
    before = files(tmp_path)
    callback = compress(tmp_path / "other.safetensors", dtrain.Dare(keep=0.25), monitor="val_acc")
    saver = checkpoints(tmp_path, save_last=True, save_top_k=-1)
    again(Classifier(), tmp_path, callback, saver)
    assert files(tmp_path).keys() - before.keys() == {tmp_path / "other.safetensors"}
    assert callback.outcome.scores["finetuned"] == finished.outcome.scores["finetuned"]
    assert callback.outcome.report.file_bytes != finished.outcome.report.file_bytes
    assert saver.save_last is True


def test_the_module_holds_the_fine_tuned_weights_in_the_end(tmp_path, finished):
    module = Classifier()
    trainer = again(module, tmp_path, compress(tmp_path / "other.safetensors"))
    tuned = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert same(state(module), tuned)
    assert [type(callback).__name__ for callback in trainer.callbacks] == ["DeltaCompressionCallback"]


def test_the_trainer_may_go_on(tmp_path, finished):
    module, limits = Classifier(), {"epochs": 4, "min_epochs": 4, "min_steps": 1, "check_val_every_n_epoch": 2}
    trainer = again(module, tmp_path, compress(tmp_path / "other.safetensors"), **limits)
    assert (trainer.max_epochs, trainer.min_epochs, trainer.min_steps) == (4, 4, 1)
    assert (trainer.max_steps, trainer.check_val_every_n_epoch) == (-1, 2)
    trainer.should_stop = False
    trainer.fit(module, train_loader(), val_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert (trainer.current_epoch, trainer.global_step) == (4, 12)


def test_adamr_does_not_mind(tmp_path):
    pull = {"strength": 0.1}
    first = compress(tmp_path / "one.safetensors", SEARCH)
    fit(Classifier(), tmp_path, AdamRCallback(**pull), first, checkpoints(tmp_path, save_last=True))
    second = compress(tmp_path / "two.safetensors", SEARCH)
    again(Classifier(), tmp_path, second, AdamRCallback(**pull))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_weights_of_anywhere_with_their_base(tmp_path, finished):
    """Published weights come without a Lightning checkpoint."""
    module, memory = Classifier(), Memory()
    save_file(Classifier().state_dict(), tmp_path / "base.safetensors")
    module.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    callback = compress(tmp_path / "x.safetensors", SEARCH, base=tmp_path / "base.safetensors", monitor="val_acc")
    again(module, tmp_path, callback, checkpoint=None, logger=memory)
    assert callback.outcome.scores == finished.outcome.scores
    last = memory.values[-1][1]
    assert last["dtrain/bytes"] == (tmp_path / "x.safetensors").stat().st_size


def test_missing_checkpoint(tmp_path):
    with pytest.raises(InputError, match=r"there is no checkpoint .*gone\.ckpt"):
        again(Classifier(), tmp_path, compress(), checkpoint="gone.ckpt")


def test_checkpoint_of_a_run_without_the_callback(tmp_path):
    fit(Classifier(), tmp_path, checkpoints(tmp_path, save_last=True))
    with pytest.raises(InputError, match="there is no snapshot of its base"):
        again(Classifier(), tmp_path, compress(tmp_path / "x.safetensors"))


def test_weights_without_a_base(tmp_path):
    with pytest.raises(InputError, match="nothing says what the fine-tuning started from"):
        again(Classifier(), tmp_path, compress(tmp_path / "x.safetensors"), checkpoint=None)
    with pytest.raises(InputError, match="no DeltaCompressionCallback"):
        compress_finished(make_trainer(tmp_path), Classifier())
