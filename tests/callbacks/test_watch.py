"""What DeltaCompressionCallback logs of the delta while it grows, and how well it projects the file."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

import dtrain
from dtrain.callbacks import AdamRCallback, DeltaCompressionCallback, watch
from dtrain.callbacks.watch import DeltaWatch
from dtrain.errors import InputError
from dtrain.stages import rebuild
from tests.callbacks.models import (
    QUIET,
    SEARCH,
    Classifier,
    Memory,
    TwoLoaders,
    checkpoints,
    compress,
    fit,
    same,
    state,
    val_loader,
)
from tests.methods.settings import SETTINGS

pytestmark = QUIET

NAMES = {f"dtrain/delta_{name}" for name in ("norm", "mean_abs", "unmoved", "kurtosis")} | {
    f"dtrain/projected_{name}" for name in ("bytes", "ratio", "error")
}
#: Methods whose bytes hang on the values: what is kept, or how well it can be coded.
CODED = (
    *("Magnitude", "ComPEFT", "Ecsq", "UltraDelta", "Wanda", "DeltaDCT", "DeltaDQ", "ImPart", "Lossless"),
    *("EoRA on a plan", "Dbms on a plan"),
)


def looks(memory):
    return [(step, values) for step, values in memory.values if "dtrain/delta_norm" in values]


def watched(folder, *callbacks, module=None, **options):
    """Fit, and return what was logged of the delta, the compression callback and the trainer."""
    memory = Memory()
    if not any(isinstance(callback, DeltaCompressionCallback) for callback in callbacks):
        callbacks = (*callbacks, compress())
    trainer = fit(module or Classifier(), folder, *callbacks, logger=memory, **options)
    return looks(memory), next(c for c in callbacks if isinstance(c, DeltaCompressionCallback)), trainer


class TestWhen:
    def test_at_the_end_of_every_epoch(self, tmp_path):
        seen, callback, _ = watched(tmp_path)
        assert [step for step, _ in seen] == [3, 6]
        assert all(set(values) == NAMES for _, values in seen)
        assert seen[-1][1]["dtrain/projected_bytes"] == pytest.approx(callback.outcome.report.file_bytes, abs=2)

    def test_every_so_many_steps(self, tmp_path):
        seen, _, _ = watched(tmp_path, compress(watch=2), accumulate_grad_batches=1)
        assert [step for step, _ in seen] == [2, 4, 6]
        seen, _, _ = watched(tmp_path, compress(watch=1), accumulate_grad_batches=2)
        assert [step for step, _ in seen] == [1, 2, 3, 4]

    def test_never(self, tmp_path):
        assert not watched(tmp_path, compress(watch="never"))[0]

    def test_not_in_a_trial_run_and_not_without_logger(self, tmp_path, monkeypatch):
        monkeypatch.setattr(DeltaWatch, "look", None)
        watched(tmp_path, fast_dev_run=True)
        fit(Classifier(), tmp_path, compress())

    def test_not_in_the_sanity_check(self, tmp_path):
        seen, _, _ = watched(tmp_path, module=TwoLoaders(), val=[val_loader(), val_loader()], num_sanity_val_steps=2)
        assert [step for step, _ in seen] == [3, 6]

    @pytest.mark.parametrize("when", [0, -1, True, 1.5, "step", None])
    def test_settings(self, when):
        with pytest.raises(InputError, match="`watch` must be 'epoch', 'never' or a number of steps"):
            compress(watch=when)

    def test_resumed(self, tmp_path):
        def run(**options):
            return watched(tmp_path, checkpoints(tmp_path / "checkpoints", save_top_k=-1), epochs=3, **options)[0]

        unbroken = run()
        resumed = run(ckpt_path=next((tmp_path / "checkpoints").glob("epoch=0*.ckpt")))
        assert resumed == unbroken[1:]


class TestValues:
    def test_are_those_of_the_delta(self, tmp_path):
        base, module = state(Classifier()), Classifier()
        seen, _, _ = watched(tmp_path, module=module)
        values = seen[-1][1]
        names = ("model.body.weight", "model.inner.weight")
        deltas = [(state(module)[name] - base[name]).double() for name in names]
        every = torch.cat([delta.flatten() for delta in deltas])
        norm = torch.cat([base[name].flatten() for name in names]).double().norm()
        assert values["dtrain/delta_norm"] == pytest.approx(float(every.norm() / norm), rel=1e-6)
        assert values["dtrain/delta_mean_abs"] == pytest.approx(float(every.abs().mean()), rel=1e-6)
        assert values["dtrain/delta_unmoved"] == float((every == 0).double().mean())
        kurtosis = sum(d.numel() * float((d**4).mean() / (d**2).mean() ** 2) for d in deltas) / every.numel()
        assert values["dtrain/delta_kurtosis"] == pytest.approx(kurtosis, rel=1e-6)

    def test_agree_with_adamr(self, tmp_path):
        seen, _, trainer = watched(tmp_path, compress(whole=["*.head.*"]), AdamRCallback(0.01, exclude=["*.head.*"]))
        adamr = float(trainer.callback_metrics["adamr/delta_norm"])
        assert seen[-1][1]["dtrain/delta_norm"] == pytest.approx(adamr, rel=1e-5)

    def test_a_strong_pull_shows(self, tmp_path):
        free, pulled = (
            watched(
                tmp_path,
                compress(method=dtrain.Lossless()),
                AdamRCallback(strength, norm="l1", normalizer="none"),
            )
            for strength in (0.0, 0.3)
        )
        assert pulled[0][-1][1]["dtrain/delta_unmoved"] > free[0][-1][1]["dtrain/delta_unmoved"] + 0.1
        assert pulled[0][-1][1]["dtrain/projected_ratio"] > free[0][-1][1]["dtrain/projected_ratio"]

    def test_nothing_moved(self, tmp_path):
        class Frozen(Classifier):
            def __init__(self):
                super().__init__()
                self.model.body.requires_grad_(False)
                self.model.inner.requires_grad_(False)

        seen, _, _ = watched(tmp_path, module=Frozen())
        assert seen[-1][1] == {"dtrain/delta_norm": 0.0, "dtrain/delta_mean_abs": 0.0, "dtrain/delta_unmoved": 1.0}

    def test_unfrozen_later(self, tmp_path):
        class Later(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                pl_module.model.body.requires_grad_(trainer.current_epoch > 0)

        seen, callback, _ = watched(tmp_path, Later())
        first, last = (values["dtrain/projected_bytes"] for _, values in seen)
        assert last == pytest.approx(callback.outcome.report.file_bytes, abs=2)
        assert last > first + 100

    def test_a_delta_that_is_no_number(self, tmp_path):
        class Diverge(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                pl_module.model.body.weight.data.fill_(math.nan)

            def on_train_end(self, trainer, pl_module):
                pl_module.model.body.weight.data.fill_(1.0)

        seen, callback, _ = watched(tmp_path, Diverge(), epochs=1)
        assert math.isnan(seen[0][1]["dtrain/delta_norm"])
        assert "dtrain/projected_bytes" not in seen[0][1]
        assert callback.outcome.path.exists()

    def test_what_cannot_be_compressed_yet_ends_no_run(self, tmp_path):
        class Overflow(Callback):
            def on_train_epoch_end(self, trainer, pl_module):
                pl_module.model.norm.running_mean.fill_(math.inf)

            def on_train_end(self, trainer, pl_module):
                pl_module.model.norm.running_mean.fill_(0.0)

        with pytest.warns(UserWarning, match=r"projects no file: tensor 'model\.norm\.running_mean' holds NaN or inf"):
            seen, callback, _ = watched(tmp_path, Overflow(), epochs=1)
        assert "dtrain/delta_norm" in seen[0][1]
        assert callback.outcome.path.exists()


class TestUntouched:
    @pytest.mark.parametrize(
        "method", [SEARCH, dtrain.Ecsq(), dtrain.EoRA(rank=1, weighted=False)], ids=lambda m: type(m).__name__
    )
    def test_the_run_is_the_run_without(self, tmp_path, method):
        runs = []
        for when in ("never", 1):
            torch.manual_seed(0)
            module = Classifier()
            trainer = fit(module, tmp_path, compress(method=method, watch=when), logger=Memory())
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
            runs.append((state(module), metrics, torch.get_rng_state()))
        assert same(runs[0][0], runs[1][0])
        assert runs[0][1] == runs[1][1]
        assert torch.equal(runs[0][2], runs[1][2])

    def test_a_second_fit_watches_from_its_own_base(self, tmp_path):
        module, memory, callback = Classifier(), Memory(), compress()
        fit(module, tmp_path, callback, logger=memory)
        middle = state(module)
        fit(module, tmp_path, callback, logger=memory)
        moved = torch.cat(
            [(state(module)[n] - middle[n]).flatten() for n in ("model.body.weight", "model.inner.weight")]
        )
        assert looks(memory)[-1][1]["dtrain/delta_mean_abs"] == pytest.approx(float(moved.abs().mean()), rel=1e-5)


class Wide(nn.Module):
    """Large enough for its rows to be sampled."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(400, 48)
        self.query = nn.Linear(48, 144)
        self.up = nn.Linear(48, 192)
        self.down = nn.Linear(192, 48)
        self.head = nn.Linear(48, 3)


def tuned(steps, seed=0):
    """Return a base and deltas that grow, each with heavier tails than the one before."""
    torch.manual_seed(seed)
    base = state(Wide())
    noise = {name: torch.randn(tensor.shape) for name, tensor in base.items()}
    spread = {name: 0.2 + torch.rand(len(tensor)) for name, tensor in base.items()}
    for step in range(1, steps + 1):
        yield (
            base,
            {
                name: tensor
                + 1e-3 * step * spread[name].view(-1, *[1] * (tensor.ndim - 1)) * noise[name].sinh() ** (step % 2 or 3)
                for name, tensor in base.items()
            },
        )


class TestProjection:
    """From a quarter of the rows, against the file of the whole."""

    @pytest.fixture(autouse=True)
    def _small_sample(self, monkeypatch):
        monkeypatch.setattr(watch, "_SAMPLE", 11_000)

    def project(self, method, steps=3):
        """Return what three looks say, the files as they are, and how often the whole was compressed for it."""
        rules = dtrain.Rules()
        made, counted, found = None, [], []
        for base, now in tuned(steps):
            weights, live = dtrain.read_weights(base), dtrain.read_weights(now)
            made = made or DeltaWatch(weights, live, method, rules)

            def whole(unfitted, weights=weights, live=live):
                counted.append(dtrain.compress(weights, live, unfitted, rules=rules))
                return counted[-1]

            found.append((made.look(live, whole), whole(made._method)))
            counted.pop()
        return found, len(counted)

    @pytest.mark.parametrize("setting", [row for row in SETTINGS if "search" not in row.id], ids=lambda row: row.id)
    def test_bytes(self, setting):
        found, wholes = self.project(setting.method)
        projected, true = zip(*((v["dtrain/projected_bytes"], delta.file_bytes()) for v, delta in found), strict=True)
        if setting.id.startswith(CODED):
            assert projected == pytest.approx(true, rel=0.04)
        else:
            assert projected == true
            assert wholes == 1
        assert found[-1][0]["dtrain/projected_ratio"] == found[-1][1].report().checkpoint_bytes / projected[-1]

    @pytest.mark.parametrize(
        ("method", "within"),
        [
            (dtrain.DareX(keep=0.1), 0.01),
            (dtrain.SeededSign(keep=0.25), 0.01),
            (dtrain.BitDelta(), 0.01),
            (dtrain.Ecsq(), 0.01),
            (dtrain.Magnitude(keep=0.3), 0.01),
            (dtrain.EoRA(), 0.11),  # of a few rows a low rank keeps more
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_error(self, method, within):
        values, delta = self.project(method, steps=1)[0][0]
        base, now = next(tuned(1))
        left = energy = 0.0
        for record in delta.content.records:
            if record.name in ("embed.weight", "query.weight", "up.weight", "down.weight"):
                wanted = (now[record.name] - base[record.name]).double()
                kept = rebuild(record.payloads, record.name, record.shape)
                left += float((wanted - kept * (kept * wanted).sum() / kept.square().sum()).square().sum())
                energy += float(wanted.square().sum())
        assert values["dtrain/projected_error"] == pytest.approx(math.sqrt(left / energy), abs=within)
