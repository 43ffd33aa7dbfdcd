"""The sweep files: expanded by W&B's own agent, run offline, read back; the objective; what a missing W&B is told."""

import json
import os
import random
import runpy
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from wandb import wandb_agent

import dtrain
from parts.offline_runs import history, records

# Lightning and its loggers warn about many things that are no fault of the recipe.
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
MODEL = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
SWEEPS = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes/sweeps").glob("*.yaml")}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the recipes, a tiny model, and nothing of W&B but what these tests leave there."""
    import wandb

    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_args": MODEL}))
    torch.manual_seed(0)
    save_file(VisionTransformer(**MODEL).state_dict(), tmp_path / "model" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb" / name.lower()))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # pytest captures it
    before = dict(os.environ)
    yield tmp_path
    wandb.teardown()
    for name in os.environ.keys() - before.keys():  # what agents leave for the processes that they start
        del os.environ[name]
    os.environ.update(before)


SHORT = [
    "--data.dataset=digits",
    "--data.batch_size=32",
    "--data.calibration=32",
    "--model.pretrained=model",
    "--trainer.max_steps=12",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
FINE_TUNE = ["recipes/vit_cifar.py", "--preset=offline", "--compare=false", "--trainer.logger=false", *SHORT]


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", list(arguments))
    runpy.run_path(arguments[0], run_name="__main__")


class InThisProcess:
    """Stands for the agent's process: the same command line and environment, without importing everything again."""

    commands: list

    def __init__(self, command, env, **_):
        import wandb

        self.commands.append(command)
        os.environ.update(env)
        try:
            run_script(self.monkeypatch, *command[2:])
            self.code = 0
        except SystemExit as error:
            self.code = error.code
        finally:
            wandb.finish()
            wandb.teardown()  # the next one reads its environment anew

    def wait(self):
        return self.code


@pytest.fixture
def in_this_process(monkeypatch):
    made = type("Made", (InThisProcess,), {"commands": [], "monkeypatch": monkeypatch})
    monkeypatch.setattr(wandb_agent, "AgentProcess", made)
    return made


def expand(monkeypatch, sweep, values):
    """Return the command line that W&B's agent makes of a sweep file and the values of a trial."""
    commands = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda command, env, **_: commands.append(command))
    agent = wandb_agent.Agent(None, None, sweep_id="s")
    agent._sweep_command = list(sweep["command"])
    arguments = {name: {"value": value} for name, value in values.items()}
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    with pytest.raises(AttributeError):  # of the process that is none
        agent._command_run({"type": "run", "run_id": "r", "program": sweep["program"], "args": arguments})
    return commands[0]


@pytest.mark.parametrize(("name", "backwards"), [*product(SWEEPS, (False, True))])
def test_the_agent_makes_a_command_line_that_the_recipe_reads(place, monkeypatch, capsys, name, backwards):
    values = {"adamr.strength": 0.02, "compress.fit_on": "logits", "method": "SeededSign", "method.keep": 0.0625}
    values = {key: values[key] for key in sorted(SWEEPS[name]["parameters"], reverse=backwards)}
    command = expand(monkeypatch, SWEEPS[name], values)
    assert command[:4] == ["/usr/bin/env", "python", "recipes/vit_cifar.py", "--config=recipes/vit_cifar.yaml"]
    assert command[-len(values) :] == [f"--{key}={value}" for key, value in values.items()]
    monkeypatch.setattr(sys, "argv", [*command[2:], "--print_config"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("recipes/vit_cifar.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert ended.value.code in (0, None)
    config = yaml.safe_load(printed)
    assert config["method"]["class_path"] == "dtrain.SeededSign"
    assert config["method"]["init_args"]["keep"] == 0.0625
    assert config["fit"]["class_path"] == "dtrain.Search"
    assert config["compress"]["path"] is None
    for key, value in values.items():
        if not key.startswith("method"):
            group, option = key.split(".")
            assert config[group][option] == value
    assert SWEEPS[name]["metric"] == {"name": "dtrain/objective", "goal": "minimize"}


def trials_of(place, name):
    runs = sorted((place / "runs/sweeps" / name / "wandb").glob("offline-run-*/run-*.wandb"))
    return [(run.stem.removeprefix("run-"), list(records(run)), history(run)) for run in runs]


def last(logged):
    return {name: value for values in logged for name, value in values.items()}


def sweep(monkeypatch, capsys, name, *arguments):
    capsys.readouterr()
    run_script(monkeypatch, "recipes/sweep_offline.py", f"recipes/sweeps/{name}.yaml", *arguments, *SHORT)
    return capsys.readouterr().out


def check_trials(place, name, printed, count):
    found = trials_of(place, name)
    assert len(found) == count
    for run, kept, logged in found:
        values = last(logged)
        delta = place / f"runs/sweeps/{name}/offline/{run}/delta.safetensors"
        assert values["dtrain/bytes"] == delta.stat().st_size
        assert f"{values['dtrain/bytes']:,}" in printed
        assert f"{values['dtrain/objective']:.3f}" in printed
        artifacts = {record.artifact.type: record.artifact for record in kept if record.HasField("artifact")}
        metadata = json.loads(artifacts["delta"].metadata)
        assert metadata["bytes"] == values["dtrain/bytes"]
        assert metadata["method"] == dtrain.load(delta).content.metadata["method"]
        assert metadata["base_fingerprint"] == dtrain.load(delta).content.fingerprint.hex()
        assert {entry.path for entry in artifacts["delta"].manifest.contents} == {
            "delta.safetensors",
            "outcome.table.json",
        }
        assert values["dtrain/outcome.nrows"] == 4
    assert (place / f"runs/sweeps/{name}/score_against_bytes.png").stat().st_size > 10_000
    return found


def config_of(kept):
    items = [item for record in kept if record.HasField("run") for item in record.run.config.update]
    items += [item for record in kept if record.HasField("config") for item in record.config.update]
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_three_trials_of_one_finished_run(place, monkeypatch, capsys, in_this_process):
    run_script(monkeypatch, *FINE_TUNE)
    checkpoints = {path: path.read_bytes() for path in (place / "runs/vit_cifar/checkpoints").iterdir()}
    printed = sweep(monkeypatch, capsys, "compress", "--trials", "3")
    found = check_trials(place, "compress", printed, 3)
    tuned = {last(logged)["dtrain/metric_finetuned"] for _, _, logged in found}
    assert len(tuned) == 1  # nothing was trained
    assert {path: path.read_bytes() for path in (place / "runs/vit_cifar/checkpoints").iterdir()} == checkpoints
    drawn = runpy.run_path("recipes/sweep_offline.py")["draw"]
    rng = random.Random(0)  # noqa: S311 - no secret is drawn
    for _, kept, _ in found:  # W&B knows what was varied, and what the recipe's own parser made of it
        values = drawn(SWEEPS["compress"]["parameters"], rng)
        config = config_of(kept)
        assert {name: config[name] for name in values} == values
        assert config["seed_everything"] == 0


def test_weights_from_elsewhere_are_compressed_with_their_base(place, monkeypatch, capsys):
    """A published checkpoint is weights and nothing else."""
    run_script(monkeypatch, *FINE_TUNE)
    (base,) = (place / "runs/vit_cifar/checkpoints").glob("*.safetensors")
    saved = torch.load(place / "runs/vit_cifar/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    tuned = {name.removeprefix("model."): tensor for name, tensor in saved.items() if name.startswith("model.")}
    save_file(tuned, place / "tuned.safetensors")
    again = [*FINE_TUNE, "--compress_only=tuned.safetensors", "--compress.path=other.safetensors"]
    with pytest.raises(SystemExit, match="nothing says what the fine-tuning started from"):
        run_script(monkeypatch, *again)
    run_script(monkeypatch, *again, f"--compress.base={base}")
    one, other = (dtrain.load(path).content for path in ("runs/vit_cifar/delta.safetensors", "other.safetensors"))
    assert one.fingerprint == other.fingerprint
    assert {record.name for record in one.records} == {record.name for record in other.records}


def test_three_trials_that_train(place, monkeypatch, capsys, in_this_process):
    printed = sweep(monkeypatch, capsys, "train", "--trials", "3", "--trainer.val_check_interval=3")
    for _, _, logged in check_trials(place, "train", printed, 3):
        objectives = [values["dtrain/objective"] for values in logged if "dtrain/objective" in values]
        assert len(objectives) == 5  # after each of four validations, and of the file
        steps = [values["trainer/global_step"] for values in logged if "dtrain/objective" in values]
        assert steps[-1] == 12
    assert not list((place / "runs").rglob("*.ckpt"))


def test_a_trial_in_a_process_of_its_own(place, monkeypatch, capsys):
    run_script(monkeypatch, *FINE_TUNE)
    printed = sweep(monkeypatch, capsys, "compress", "--trials", "1")
    check_trials(place, "compress", printed, 1)
    methods = yaml.safe_load(Path("recipes/sweeps/compress.yaml").read_text())["parameters"]["method"]["values"]
    assert any(method in printed for method in methods)


def test_a_failing_trial_says_why(place, monkeypatch, capsys, in_this_process):
    with pytest.raises(SystemExit, match="ended with exit code"):
        sweep(monkeypatch, capsys, "compress", "--trials", "1")  # there is no finished run


def test_missing_wandb(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        run_script(monkeypatch, "recipes/vit_cifar.py", "--preset=offline", "--trainer.logger=WandbLogger", *SHORT)
    with pytest.raises(SystemExit, match="pip install wandb"):
        sweep(monkeypatch, capsys, "compress")


def test_nobody_logged_in(place, monkeypatch):
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    with pytest.raises(SystemExit, match=r"`wandb login`, or keep the run on this machine: set WANDB_MODE=offline"):
        run_script(monkeypatch, "recipes/vit_cifar.py", "--preset=offline", "--trainer.logger=WandbLogger", *SHORT)
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (None, "there is no sweep file"),
        ("a: [1", "is no YAML"),
        ("# nothing", "has no program, metric, parameters, command; it has nothing"),
        ({"program": "x"}, "has no metric, parameters, command; it has program"),
        ({"parameters": {"keep": {"distribution": "normal", "mu": 0}}}, "no draws from 'normal'"),
    ],
)
def test_sweep_files_that_cannot_be_run_here(place, monkeypatch, lines, sentence):
    path = place / "sweep.yaml"
    if lines is not None:
        whole = lines if isinstance(lines, str) or "program" in lines else {**SWEEPS["compress"], **lines}
        path.write_text(whole if isinstance(whole, str) else yaml.safe_dump(whole))
    with pytest.raises(SystemExit, match=sentence):
        run_script(monkeypatch, "recipes/sweep_offline.py", str(path))


def test_draws_follow_the_distributions():
    drawn = runpy.run_path(str(ROOT / "recipes/sweep_offline.py"))["draw"]
    parameters = {
        "fixed": {"value": "x"},
        "one": {"values": [1, 2, 3]},
        "whole": {"distribution": "int_uniform", "min": 1, "max": 3},
        "plain": {"min": 0.5, "max": 1.0},
        "log": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1.0},
    }
    rng = random.Random(1)  # noqa: S311 - no secret is drawn
    draws = [drawn(parameters, rng) for _ in range(400)]
    assert {values["fixed"] for values in draws} == {"x"}
    assert {values["one"] for values in draws} == {values["whole"] for values in draws} == {1, 2, 3}
    assert all(0.5 <= values["plain"] <= 1 for values in draws)
    assert sum(values["log"] < 1e-2 for values in draws) == pytest.approx(200, abs=40)
