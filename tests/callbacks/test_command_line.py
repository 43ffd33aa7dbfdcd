"""DeltaCompressionCallback from the command line."""

from __future__ import annotations

import sys

import lightning.pytorch as pl
import pytest

import dtrain
from dtrain.callbacks import DeltaCompressionCallback
from tests.callbacks.models import (
    QUIET,
    Classifier,
)

pytestmark = QUIET


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # LightningCLI uses what jsonargparse is to drop
class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _no_arguments_of_pytest(self, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["train.py"])

    def cli(self, *arguments):
        from lightning.pytorch.cli import LightningCLI

        class Data(pl.LightningDataModule):
            pass

        given = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_checkpointing=false"]
        return LightningCLI(
            Classifier, Data, run=False, args=[*given, *arguments], save_config_callback=None, seed_everything_default=0
        )

    NAME = "--trainer.callbacks+=dtrain.callbacks.DeltaCompressionCallback"
    EVERYTHING = (
        "--trainer.callbacks.method=dtrain.DareX",
        "--trainer.callbacks.method.keep=0.05",
        "--trainer.callbacks.method.q=norm",
        "--trainer.callbacks.path=out.safetensors",
        "--trainer.callbacks.monitor=val_acc",
        "--trainer.callbacks.mode=min",
        "--trainer.callbacks.source=best",
        "--trainer.callbacks.module=model",
        "--trainer.callbacks.base=base.ckpt",
        "--trainer.callbacks.fit_on=metric",
        "--trainer.callbacks.calibration_batches=3",
        "--trainer.callbacks.include=[a.*]",
        "--trainer.callbacks.exclude=[b.*,c]",
        "--trainer.callbacks.whole=[]",
        "--trainer.callbacks.drop=[d]",
        "--trainer.callbacks.embeddings=[]",
        "--trainer.callbacks.vectors=uniform8",
        "--trainer.callbacks.fresh=exact",
        "--trainer.callbacks.watch=50",
        "--trainer.callbacks.fit=dtrain.Search",
        "--trainer.callbacks.fit.per=tensor",
    )
    SHIFTED = (
        "--trainer.callbacks.method=dtrain.Dbms",
        "--trainer.callbacks.method.host=dtrain.DareX",
        "--trainer.callbacks.method.host.keep=0.05",
        "--trainer.callbacks.method.source=shared",
        "--trainer.callbacks.shared=family.safetensors",
        "--trainer.callbacks.fit=dtrain.Learn",
        "--trainer.callbacks.fit.steps=50",
        "--trainer.callbacks.fit_on=logits",
    )

    def callback(self, trainer):
        return next(callback for callback in trainer.callbacks if isinstance(callback, DeltaCompressionCallback))

    def test_no_argument(self):
        callback = self.callback(self.cli(self.NAME).trainer)
        assert (callback.method, callback.fit) == (dtrain.SeededSign(keep=1 / 8), dtrain.Search())

    def test_every_argument(self):
        callback = self.callback(self.cli(self.NAME, *self.EVERYTHING).trainer)
        self.check(callback)

    def check(self, callback):
        assert callback.method == dtrain.DareX(keep=0.05, q="norm")
        assert (str(callback.path), callback.monitor, callback.mode) == ("out.safetensors", "val_acc", "min")
        assert (callback.source, callback.module, callback.fit_on) == ("best", "model", "metric")
        assert callback.calibration_batches == 3
        assert callback.rules == dtrain.Rules(
            include=["a.*"],
            exclude=["b.*", "c"],
            whole=[],
            drop=["d"],
            embeddings=[],
            vectors="uniform8",
            fresh="exact",
        )
        assert (callback.watch, callback.fit) == (50, dtrain.Search(per="tensor"))

    def test_a_shifted_base_and_learnt_scales(self, capsys, tmp_path):
        with pytest.raises(SystemExit):
            self.cli(self.NAME, *self.SHIFTED, "--print_config")
        (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
        for given in ([self.NAME, *self.SHIFTED], [f"--config={tmp_path / 'config.yaml'}"]):
            callback = self.callback(self.cli(*given).trainer)
            assert callback.method.hosts == dtrain.Dbms(host=dtrain.DareX(keep=0.05), source="shared").hosts
            assert (callback.fit, callback.fit_on) == (dtrain.Learn(steps=50), "logits")
            assert callback.shared == "family.safetensors"

    def test_print_config_round_trip(self, capsys, tmp_path):
        with pytest.raises(SystemExit):
            self.cli(self.NAME, *self.EVERYTHING, "--print_config")
        (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
        self.check(self.callback(self.cli(f"--config={tmp_path / 'config.yaml'}").trainer))

    @pytest.mark.parametrize(
        ("argument", "message"),
        [
            ("source=first", "'last', 'best'"),
            ("mode=up", "'max', 'min'"),
            ("method.mask=dense", "'bernoulli', 'stratified'"),
            ("watch=often", "'epoch', 'never'"),
            ("fit=dtrain.BitDelta", "dtrain.BitDelta"),
        ],
    )
    def test_bad_literal(self, capsys, argument, message):
        method = ["--trainer.callbacks.method=dtrain.DareX"] if "method" in argument else []
        with pytest.raises(SystemExit):
            self.cli(self.NAME, *method, f"--trainer.callbacks.{argument}")
        assert message in capsys.readouterr().err

    def test_flags_of_their_own(self):
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser()
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        given = [argument.replace("trainer.callbacks", "compress") for argument in self.EVERYTHING]
        config = parser.parse_args(given)
        again = parser.parse_string(parser.dump(config))
        self.check(parser.instantiate(again).compress)

    def test_help(self, capsys):
        from lightning.pytorch.cli import LightningArgumentParser

        parser = LightningArgumentParser()
        parser.add_lightning_class_args(DeltaCompressionCallback, "compress")
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert "Number of training batches for the fit" in capsys.readouterr().out
