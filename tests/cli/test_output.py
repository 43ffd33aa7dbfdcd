"""What people and programs get to read."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain.artifact import read_file
from dtrain.methods import METHODS

ROOT = Path(__file__).parents[2]


def test_json_is_one_object_and_nothing_else(run):
    def data(*argv):
        code, out, err = run(*argv, "--json")
        assert (code, err) == (0, "")
        assert out.endswith("}\n")
        assert out.count("\n") == 1
        return json.loads(out, parse_constant=pytest.fail)  # NaN and Infinity are no JSON

    made = data("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--method", "Lossless")
    content = read_file("d.safetensors")
    fingerprint = content.fingerprint.hex()
    assert made["file_bytes"] == Path("d.safetensors").stat().st_size
    assert made["nominal_bits"] is None
    assert made["ratio"] == made["checkpoint_bytes"] / made["file_bytes"]
    shown = data("inspect", "d.safetensors", "--tensors")
    assert shown["metadata"] == content.metadata
    assert [row["name"] for row in shown["records"]] == [record.name for record in content.records]
    assert sum(row["payload_bytes"] for row in shown["records"]) == sum(row["payload_bytes"] for row in made["rows"])
    checked = data("verify", "base.safetensors", "d.safetensors")
    assert checked["ok"] is True
    merged = data("apply", "base.safetensors", "d.safetensors", "merged.safetensors")
    assert merged["bytes"] == Path("merged.safetensors").stat().st_size
    assert {answer["fingerprint"] for answer in (made, shown, checked, merged)} == {fingerprint}
    listed = data("methods")["methods"]
    assert [row["name"] for row in listed] == [method.__name__ for method in METHODS]
    assert next(row for row in listed if row["name"] == "Lossless")["nominal_bits"] is None


def test_inspect_for_people(run, delta):
    code, out, err = run("inspect", delta)
    assert (code, err) == (0, "")
    assert "smaller than the checkpoint" in out
    assert read_file(delta).fingerprint.hex() in out
    assert "layers.0.up.weight" not in out
    code, out, _ = run("inspect", delta, "--tensors")
    line = next(line for line in out.splitlines() if "layers.0.up.weight" in line)
    assert line.split()[:6] == ["layers.0.up.weight", "add", "float32", "32", "x", "48"]


def test_inspect_shows_rules_and_names_with_brackets(run, pair):
    base, tuned = pair
    save_file({**base, "[bold]x[/bold]": torch.zeros(2, 2)}, "base.safetensors")
    save_file({**tuned, "[bold]x[/bold]": torch.ones(2, 2)}, "tuned.safetensors")
    run("compress", "base.safetensors", "tuned.safetensors", "d.safetensors", "--drop", "half.*")
    out = run("inspect", "d.safetensors", "--tensors")[1]
    assert '"drop": ["half.*"]' in out
    assert "[bold]x[/bold]" in out


def test_verify_says_ok_in_one_line(run, delta):
    code, out, err = run("verify", "base.safetensors", delta)
    assert (code, err) == (0, "")
    assert out.startswith("ok: ")
    assert out.count("\n") == 1
    assert read_file(delta).fingerprint.hex() in out


def test_methods_for_people(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    for method in METHODS:
        assert method.__name__ in out
    assert "2311.03099" in out
    found = json.loads(run("methods", "--json")[1])["methods"]
    by_name = {entry["name"]: entry for entry in found}
    assert by_name["DeltaDQ"]["nominal_bits"] == 0.125
    assert 0.3 < by_name["DeltaDQ"]["true_bits"] < 0.4
    assert by_name["Wanda"]["needs"] == "training inputs"
    assert run("methods", "--markdown")[1].startswith("| method | what it does |")


@pytest.mark.parametrize("command", ["compress", "share", "apply", "inspect", "verify", "advise", "methods"])
def test_every_command_has_help(run, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: dtrain {command}")
    assert "--json" in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0
    for words in ("compress", "exit codes:", "130"):
        assert words in out
    out = run("compress", "--help")[1]
    assert "needs no data" in " ".join(out.split())
    assert run("--version")[1] == f"dtrain {dtrain.__version__}\n"


def test_help_of_a_method_is_its_docstring(run):
    code, out, _ = run("compress", "--method.help", "DareX")
    assert code == 0
    assert "--method.keep KEEP" in out
    assert "Share of the delta's elements that is kept" in out


def test_the_module_runs(delta, run):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", "-m", "dtrain", "verify", "base.safetensors", delta]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run("verify", "base.safetensors", delta)[1]


def test_the_parser_needs_no_torch():
    """Help and usage errors should not wait for torch, as far as the command line can help it."""
    code = "import sys; sys.modules['dtrain'] = type(sys)('dtrain'); sys.modules['dtrain'].__path__ = [sys.argv[1]]\n"
    code += "sys.modules['dtrain'].__version__ = '0'\n"
    code += (
        "import dtrain.cli; dtrain.cli.main(['verify', '--help']); sys.exit(bool({'torch', 'rich'} & {*sys.modules}))"
    )
    command = [sys.executable, "-c", code, str(ROOT / "dtrain")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, capture_output=True, env=environment, check=False).returncode == 0
