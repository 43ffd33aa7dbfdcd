"""When DeltaCompressionCallback does nothing or refuses: dry runs, other stages, the order of callbacks."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import nn

from dtrain.callbacks import DeltaCompressionCallback
from dtrain.errors import DtrainError, InputError
from tests.callbacks.models import (
    QUIET,
    SEARCH,
    Classifier,
    checkpoints,
    compress,
    fit,
    make_trainer,
    val_loader,
)

pytestmark = QUIET


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
        assert torch.equal(merged["model.head.bias"], module.model.head.bias)
