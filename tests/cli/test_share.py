"""A family on the command line: `dtrain share`, and `--shared` where a delta refers to a shared file."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import dtrain
from dtrain.artifact import file_digest
from dtrain.stages import SHARED, Payload
from tests.cli.tools import check_refusal, files, same, shift

FAMILY = ("base.safetensors", "tuned.safetensors", "other.safetensors")


@pytest.fixture(autouse=True)
def _other(pair):
    save_file({name: shift(tensor) for name, tensor in pair[1].items()}, "other.safetensors")


@pytest.fixture
def task(run):
    """The name of a delta that refers to the shared file in `family/`."""
    Path("family").mkdir()
    assert run("share", *FAMILY, "family/shared.safetensors")[0] == 0
    content = dtrain.compress(*FAMILY[:2], dtrain.Dare(seed=1)).content
    shared = dtrain.load("family/shared.safetensors").content
    names = {record.name for record in shared.records if record.payloads}
    reference = Payload(SHARED, torch.empty(0, dtype=torch.uint8), 0.5)
    records = [replace(r, payloads=(reference, *r.payloads)) if r.name in names else r for r in content.records]
    content = replace(content, records=tuple(records), shared=file_digest(shared))
    dtrain.Delta(content, shared=shared).save("task.safetensors")
    return "task.safetensors"


@pytest.mark.parametrize(
    ("words", "method", "options"),
    [
        ((), dtrain.Dare(), {}),
        (("--merge", "elect"), dtrain.Dare(), {"merge": "elect"}),
        (("--method", "SeededSign", "--method.keep", "0.25"), dtrain.SeededSign(keep=0.25), {}),
        (("--exclude", "layers.0.*"), dtrain.Dare(), {"rules": dtrain.Rules(exclude=["layers.0.*"])}),
    ],
    ids=repr,
)
def test_share_writes_the_very_file_that_shared_base_writes(run, words, method, options):
    code, out, err = run("share", *FAMILY, "shared.safetensors", *words)
    assert (code, err) == (0, "")
    expected = dtrain.shared_base(FAMILY[0], FAMILY[1:], method, **options)
    expected.save("expected.safetensors")
    assert Path("shared.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()
    assert out.endswith(f"wrote shared.safetensors, which deltas refer to as {file_digest(expected.content).hex()}\n")


def test_what_share_writes_is_a_delta(run, pair):
    code, out, _ = run("share", *FAMILY, "shared.safetensors", "--json")
    data = json.loads(out)
    assert (code, data["out"]) == (0, "shared.safetensors")
    assert data["sha256"] == Path("shared.safetensors").read_bytes()[-32:].hex()
    assert run("verify", "base.safetensors", "shared.safetensors")[0] == 0
    assert run("apply", "base.safetensors", "shared.safetensors", "merged.safetensors")[0] == 0
    assert load_file("merged.safetensors").keys() == pair[0].keys()


def test_more_than_two_fine_tunes(run, pair):
    save_file({name: shift(tensor) for name, tensor in pair[1].items()}, "third.safetensors")
    assert run("share", *FAMILY, "third.safetensors", "shared.safetensors")[0] == 0
    assert dtrain.load("shared.safetensors").content.metadata["shared"]["finetunes"] == 3


def test_a_delta_with_a_reference_is_applied(run, task):
    expected = dtrain.load(task, "family/shared.safetensors").state_dict("base.safetensors")
    given = ("--shared", "family/shared.safetensors")
    assert run("verify", "base.safetensors", task, *given)[0] == 0
    assert run("apply", "base.safetensors", task, "merged.safetensors", *given)[0] == 0
    same(load_file("merged.safetensors"), expected)
    Path("family/shared.safetensors").rename("beside.safetensors")
    assert run("verify", "base.safetensors", task)[0] == 0
    assert run("apply", "base.safetensors", task, "again.safetensors")[0] == 0
    same(load_file("again.safetensors"), expected)


def test_inspect_says_that_another_file_is_needed(run, task):
    digest, size = Path("family/shared.safetensors").read_bytes()[-32:].hex(), Path("family/shared.safetensors").stat()
    code, out, _ = run("inspect", task, "--shared", "family/shared.safetensors")
    assert code == 0
    assert f"needs the shared file of {size.st_size:,} bytes, SHA-256 {digest}, not counted here" in out
    code, out, _ = run("inspect", task, "--shared=family/shared.safetensors", "--tensors", "--json")
    data = json.loads(out)
    assert (data["shared"], data["shared_bytes"]) == (digest, size.st_size)
    assert data["file_bytes"] == Path(task).stat().st_size
    assert {len(record["scales"]) for record in data["records"]} >= {0, 1, 2}


@pytest.mark.parametrize("command", [("verify", "base.safetensors"), ("inspect",)])
def test_a_missing_shared_file_is_one_sentence(run, task, command):
    before = files()
    check_refusal(run(*command, task), 1, task, "shared file", "--shared FILE")
    check_refusal(run(*command, task, "--shared", "tuned.safetensors"), 1, "tuned.safetensors")
    check_refusal(run(*command, task, "--shared", "nowhere"), 1, "nowhere", "cannot be read")
    check_refusal(run("apply", "base.safetensors", task, "merged.safetensors"), 1, "--shared FILE")
    assert files() == before


def test_share_refuses(run):
    before = files()
    check_refusal(run("share", *FAMILY[:2], "shared.safetensors"), 1, "two models or more")
    check_refusal(run("share", *FAMILY, "shared"), 2, "shared.safetensors")
    check_refusal(run("share", *FAMILY, "tuned.safetensors"), 2, "OUT and FINETUNED are the same file")
    check_refusal(run("share", *FAMILY, "base.safetensors"), 2, "OUT and BASE are the same file")
    check_refusal(run("share", "zeros", *FAMILY[1:], "shared.safetensors"), 2, "zeros")
    check_refusal(run("share", *FAMILY, "shared.safetensors", "--method", "Lossless"), 1, "Lossless")
    check_refusal(run("share", *FAMILY, "shared.safetensors", "--method", "Wanda"), 2, "Wanda", "without data")
    check_refusal(run("share", *FAMILY, "shared.safetensors", "--merge", "max"), 2, "merge")
    check_refusal(run("share", "base.safetensors"), 2, "missing")
    assert files() == before


def test_apply_does_not_write_over_the_shared_file(run, task):
    words = ("family/shared.safetensors", "--shared", "family/shared.safetensors")
    check_refusal(run("apply", "base.safetensors", task, *words), 2, "OUT and SHARED are the same file")
