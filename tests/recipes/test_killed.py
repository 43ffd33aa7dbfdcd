"""A recipe whose process is killed while it trains, and which is resumed, ends as one that was left alone."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

# Lightning and its loggers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "recipes" / "vit_cifar.py")
MODEL = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
STEPS = 16  # four epochs; as in the presets it is steps that end a run, after which Lightning counts otherwise
RUN = ["--preset=offline", "--model.pretrained=base", "--data.batch_size=128", "--trainer.accelerator=cpu"]
RUN += ["--trainer.enable_progress_bar=false", f"--trainer.max_steps={STEPS}"]
RUN += ["--method=DareX", "--method.keep=0.1", "--method.masks=1", "--compress.calibration_batches=1"]
RUN += ["--data.workers=1"]  # a worker reads ahead, before a training says which epoch it is in


def write_base(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_args": MODEL}))
    save_file(VisionTransformer(**MODEL).state_dict(), folder / "model.safetensors")


def kill_after_an_epoch(last: Path) -> None:
    """Begin the run in a process of its own, and kill it as soon as there is a checkpoint."""
    command = [sys.executable, SCRIPT, *RUN]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not last.exists() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_a_killed_run_that_is_resumed_ends_as_one_that_was_left_alone(tmp_path, monkeypatch, capsys):
    def run(*more: str) -> str:
        """Run the recipe in this process, which is quicker, and return the tables that it prints."""
        monkeypatch.setattr(sys, "argv", [SCRIPT, *RUN, *more])
        runpy.run_path(SCRIPT, run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    write_base(Path("base"))
    tables = run()
    assert "compressed" in tables
    assert "linear probe" in tables
    whole, broken = Path("whole"), Path("runs/vit_cifar")
    broken.rename(whole)
    last = broken / "checkpoints/last.ckpt"
    kill_after_an_epoch(last)
    assert torch.load(last, weights_only=True)["global_step"] < STEPS
    assert not (broken / "delta.safetensors").exists()
    assert run(f"--ckpt_path={last}") == tables
    assert (broken / "delta.safetensors").read_bytes() == (whole / "delta.safetensors").read_bytes()
    unbroken, resumed = (torch.load(end / "checkpoints/last.ckpt", weights_only=True) for end in (whole, broken))
    assert unbroken["global_step"] == resumed["global_step"] == STEPS
    assert all(torch.equal(resumed["state_dict"][name], tensor) for name, tensor in unbroken["state_dict"].items())
