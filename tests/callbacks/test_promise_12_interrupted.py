"""Promise 12: an interrupted training leaves usable things: no hooks, no half files, and weights to go on with."""

from __future__ import annotations

import os
import pickle
import re
import signal
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

import dtrain
from dtrain.artifact.atomic import SUFFIX
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback, compress_finished
from dtrain.callbacks.snapshot import BaseSnapshot, fingerprint_hex
from dtrain.callbacks.writing import on_first_rank
from dtrain.errors import ArtifactError, InputError
from dtrain.weights import read_weights
from tests.artifact.faults import FULL, full_disk, in_a_process, steps
from tests.callbacks.models import (
    DARE,
    QUIET,
    SEARCH,
    Classifier,
    fit,
    make_trainer,
    same,
    state,
    train_loader,
    val_loader,
)

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")]

EPOCHS = 6
FILE, LAST = "delta.safetensors", "last.ckpt"


def fail():
    raise RuntimeError("broken")


def interrupt():
    raise KeyboardInterrupt


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


#: What happens, and as what it leaves `fit`: Lightning makes an exit of an interrupt and of SIGTERM.
DEEDS = {fail: RuntimeError, interrupt: SystemExit, terminate: SystemExit}
over_deeds = pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.__name__)


class Breaks(Classifier):
    """Does the deed in the second batch of one epoch, or in a validation of `limit` batches after training."""

    def __init__(self, deed=None, epoch=None, limit=None):
        super().__init__()
        self.deed, self.epoch, self.limit = deed, epoch, limit

    def training_step(self, batch, batch_idx):
        if self.epoch == self.current_epoch and batch_idx == 1:
            self.deed()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        if self.limit is not None and self.trainer.limit_val_batches == self.limit and self.trainer.fit_loop.done:
            self.deed()
        super().validation_step(batch, batch_idx)


class Last(pl.Callback):
    """Remembers the weights after the last step."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.state = state(pl_module)


class Full(pl.Callback):
    """The disk is full when training ends, and no longer when the run has broken off."""

    def on_train_end(self, trainer, pl_module):
        self.context = full_disk(300)
        self.context.__enter__()

    def on_exception(self, trainer, pl_module, exception):
        self.context.__exit__(None, None, None)


def callbacks(folder, *more, method=DARE):
    compress = DeltaCompressionCallback(method, folder / FILE, monitor="val_acc")
    saver = ModelCheckpoint(dirpath=folder / "checkpoints", save_last=True)
    return [*more, AdamRCallback(0.1), compress, saver]


def shaken():
    """Return a module as a fresh process would have it, at other weights than those of the first."""
    module = Classifier()
    with torch.no_grad():
        for param in module.parameters():
            param.add_(1)
    return module


def resume(folder):
    module = shaken()
    fit(module, folder, *callbacks(folder), epochs=EPOCHS, ckpt_path=folder / "checkpoints" / LAST)
    return module


@pytest.fixture(autouse=True)
def _usual_handlers():
    """Handle signals as in a terminal: a shell's background job ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Return the final weights and the bytes of the file of unbroken runs, by their number of epochs."""
    found = {}
    for epochs in (1, 3, 5, EPOCHS):
        folder, module = tmp_path_factory.mktemp("unbroken"), Classifier()
        fit(module, folder, *callbacks(folder), epochs=epochs)
        found[epochs] = state(module), (folder / FILE).read_bytes()
    return found


def check_left(folder, trainer, module, last):
    """Look at what a broken run leaves: its weights, nobody's hooks, whole files."""
    assert same(state(module), last.state)
    assert all(not optimizer._optimizer_step_post_hooks for optimizer in trainer.optimizers)
    for part in module.modules():
        assert not [*part._forward_hooks, *part._forward_pre_hooks, *part._backward_hooks]
    assert "setup" not in vars(module)
    assert not list(folder.rglob(f"*{SUFFIX}"))
    for path in folder.rglob("*.safetensors"):
        if path.name != FILE:  # the base's snapshot
            load_file(path)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with torch.no_grad():
        assert module.eval()(torch.zeros(1, 12)).isfinite().all()


def broken_run(folder, module, *more, epochs=EPOCHS, error=InputError, method=DARE):
    last = Last()
    trainer = make_trainer(folder, *callbacks(folder, last, *more, method=method), epochs=epochs)
    with pytest.raises(error) as raised:
        trainer.fit(module, train_loader(), val_loader())
    check_left(folder, trainer, module, last)
    return trainer, str(raised.value)


@over_deeds
@pytest.mark.parametrize("epoch", [1, 3, 5])
def test_in_training(tmp_path, unbroken, deed, epoch):
    (tmp_path / FILE).write_bytes(b"old")
    broken_run(tmp_path, Breaks(deed, epoch), error=DEEDS[deed])
    assert (tmp_path / FILE).read_bytes() == b"old"
    weights, content = unbroken[EPOCHS]
    assert same(state(resume(tmp_path)), weights)
    assert (tmp_path / FILE).read_bytes() == content


@pytest.mark.parametrize("epochs", [1, 3, 5])
def test_the_disk_is_full_when_training_ends(tmp_path, unbroken, epochs):
    (tmp_path / FILE).write_bytes(b"old")
    trainer, said = broken_run(tmp_path, Classifier(), Full(), epochs=epochs)
    assert f"{tmp_path / FILE} cannot be written (File too large). Nothing was changed; give a path" in said
    assert (tmp_path / FILE).read_bytes() == b"old"
    # What was worked out is not lost: it can be saved elsewhere,
    (callback,) = (one for one in trainer.callbacks if isinstance(one, DeltaCompressionCallback))
    callback.delta.save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere").read_bytes() == unbroken[epochs][1]
    assert callback.outcome is None
    # compressed again without training,
    again, last = shaken(), tmp_path / "checkpoints" / LAST
    compress_finished(make_trainer(tmp_path, *callbacks(tmp_path)), again, last, **loaders())
    assert same(state(again), unbroken[epochs][0])
    assert (tmp_path / FILE).read_bytes() == unbroken[epochs][1]
    # or the run goes on.
    assert same(state(resume(tmp_path)), unbroken[EPOCHS][0])
    assert (tmp_path / FILE).read_bytes() == unbroken[EPOCHS][1]


def loaders():
    return {"train_dataloaders": train_loader(), "val_dataloaders": val_loader()}


def test_a_run_that_was_over_says_so(tmp_path):
    fit(Classifier(), tmp_path, *callbacks(tmp_path), epochs=1)
    with pytest.warns(UserWarning, match=r"nothing was trained, so nothing was compressed.*compress_finished"):
        fit(shaken(), tmp_path, *callbacks(tmp_path), epochs=1, ckpt_path=tmp_path / "checkpoints" / LAST)


@over_deeds
@pytest.mark.parametrize("when", ["search", "measure"])
def test_while_the_file_is_made(tmp_path, deed, when):
    """A search validates eight batches at a time; what is measured is measured when the file is there."""
    (tmp_path / FILE).write_bytes(b"old")
    module = Breaks(deed, limit=8 if when == "search" else 1.0)
    broken_run(tmp_path, module, epochs=1, error=DEEDS[deed], method=SEARCH)
    if when == "search":
        assert (tmp_path / FILE).read_bytes() == b"old"
    else:
        dtrain.load(tmp_path / FILE).verify(Classifier())


def test_an_interrupt_of_the_search_is_one_of_the_run(tmp_path):
    class Notes(pl.Callback):
        def on_exception(self, trainer, pl_module, exception):
            self.seen = (trainer, pl_module.trainer, type(exception))

    notes = Notes()
    broken_run(tmp_path, Breaks(interrupt, limit=8), notes, epochs=1, error=SystemExit, method=SEARCH)
    assert notes.seen[0] is notes.seen[1]
    assert notes.seen[2] is KeyboardInterrupt


class TestSnapshot:
    """The base's snapshot is written before the first step: if it cannot be, nothing has happened yet."""

    def keep(self, folder):
        weights = read_weights(Classifier())
        trainer = SimpleNamespace(
            is_global_zero=True,
            strategy=SimpleNamespace(broadcast=lambda value: value),
            checkpoint_callbacks=[],
            default_root_dir=folder,
            ckpt_path=None,
        )
        BaseSnapshot("dtrain-base-1.safetensors", fingerprint_hex(weights)).keep(trainer, weights)
        return folder / "dtrain-base-1.safetensors"

    def test_a_failure_or_an_end_at_any_step(self, tmp_path):
        path = tmp_path / "dtrain-base-1.safetensors"
        with steps() as taken:
            self.keep(tmp_path)
        last = taken.names.index("replace") + 1
        for number in range(1, len(taken.names) + 1):
            for old in (None, b"damaged"):
                path.unlink() if old is None else path.write_bytes(old)
                with steps(number, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
                    self.keep(tmp_path)
                assert [file for file in tmp_path.iterdir() if file != path] == []
                if number > last:
                    load_file(path)
                else:
                    assert (path.read_bytes() if path.exists() else None) == old
            if number <= last:
                refused = (
                    re.escape(f"{path} cannot be written (No space") if number > 1 else "cannot be written .No space"
                )
                with steps(number, FULL), pytest.raises(InputError, match=refused):
                    self.keep(tmp_path)
                assert path.read_bytes() == b"damaged"

            def work(number=number):
                with steps(number, lambda: os._exit(9)):
                    self.keep(tmp_path)

            if number <= last:
                assert in_a_process(work) == 9
                assert path.read_bytes() == b"damaged"
            self.keep(tmp_path)
            load_file(path)
            for left in tmp_path.glob(f".*{SUFFIX}"):
                left.unlink()

    def test_the_disk_is_full(self, tmp_path):
        module = Classifier()
        with (
            full_disk(300),
            pytest.raises(InputError, match=r"dtrain-base-\w+\.safetensors cannot be written .File too"),
        ):
            fit(module, tmp_path, *callbacks(tmp_path), epochs=1)
        assert same(state(module), state(Classifier()))
        assert not list(tmp_path.rglob("*.safetensors*"))
        assert not list(tmp_path.rglob(f"*{SUFFIX}"))


def test_every_rank_hears_of_a_failed_write():
    """One that waited for a rank that failed would wait forever."""
    told = []

    def first():
        raise InputError("no room")

    def trainer(rank):
        broadcast = (lambda value: told.append(value) or value) if rank == 0 else (lambda _: told[0])
        return SimpleNamespace(is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=broadcast))

    for rank in (0, 1):
        with pytest.raises(InputError, match="no room"):
            on_first_rank(trainer(rank), first if rank == 0 else fail)


@pytest.mark.parametrize(
    "error", [InputError("no room"), ArtifactError("delta", "checksum", "bad. Copy it again.", "w")]
)
def test_an_error_can_be_told_to_another_process(error):
    found = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))
