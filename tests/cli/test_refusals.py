"""What a wrong command line, a broken file or an interrupt leads to: one sentence, and nothing left behind."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dtrain.cli import commands
from dtrain.methods import METHODS
from tests.cli.tools import check_refusal, files

LISTED = ", ".join(method.__name__ for method in METHODS[:-1]) + " and Lossless"
USAGE = {
    "nothing": ([], "compress, share, apply, inspect, verify, advise and methods"),
    "unknown command": (["compres"], "'compres'", "compress, share, apply, inspect, verify, advise and methods"),
    "missing OUT": (["compress", "a", "b"], "OUT is missing"),
    "one too many": (["verify", "a", "b", "c"], "unrecognized arguments: c"),
    "unknown option": (["inspect", "d", "--tensorz"], "--tensorz"),
    "unknown method": (["compress", "a", "b", "c", "--method", "Foo"], "'Foo'", LISTED),
    "mistyped method": (["compress", "a", "b", "c", "--method=darex"], "Did you mean DareX?"),
    "help of none": (["compress", "--method.help", "Foo"], "'Foo'", LISTED),
    "no method": (["compress", "a", "b", "c", "--method", "dtrain.Rules"], "--method: ", "subclass of Method"),
    "method without value": (["compress", "a", "b", "c", "--method"], "--method wants a value"),
    "argument without value": (["compress", "a", "b", "c", "--method.keep"], "--method.keep wants a value"),
    "unknown argument": (["compress", "a", "b", "c", "--method.foo", "1"], "Dare has no argument 'foo'"),
    "keep is no number": (["compress", "a", "b", "c", "--method.keep", "x"], "--method.keep cannot be 'x'"),
    "mask is no mask": (["compress", "a", "b", "c", "--method.mask", "x"], "--method.mask cannot be 'x'"),
    "q is no q": (["compress", "a", "b", "c", "--method=DareX", "--method.q=x"], "--method.q cannot be 'x'"),
    "keep=0": (["compress", "a", "b", "c", "--method.keep", "0"], "`keep` must be in [2**-24, 1], got 0.0"),
    "keep=2": (["compress", "a", "b", "c", "--method.keep", "2"], "`keep` must be in [2**-24, 1], got 2.0"),
    "needs data": (
        ["compress", "a", "b", "c", "--method", "DareX"],
        "training inputs",
        "--method.q keep",
        "dtrain.compress(",
    ),
    "needs inputs": (
        ["compress", "a", "b", "c", "--method", "Wanda"],
        "looks at the inputs",
        "Magnitude",
        "calibration=",
    ),
    "needs inputs, or not": (["compress", "a", "b", "c", "--method", "EoRA"], "--method.weighted false"),
    "OUT is BASE": (["compress", "base.safetensors", "tuned.safetensors", "./base.safetensors"], "OUT and BASE"),
    "OUT is FINETUNED": (["compress", "base.safetensors", "tuned.safetensors", "tuned.safetensors"], "FINETUNED"),
    "OUT is DELTA": (["apply", "base.safetensors", "tuned.safetensors", "tuned.safetensors"], "OUT and DELTA"),
    "OUT is no .safetensors": (["apply", "a", "b", "merged.bin"], "merged.bin", "Use merged.safetensors"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_line_is_code_2(run, case):
    argv, *words = USAGE[case]
    before = files()
    check_refusal(run(*argv), 2, *words)
    assert files() == before


@pytest.mark.parametrize(
    "argv", [["compress", "folder", "tuned.safetensors"], ["apply", "folder", "delta.safetensors"]]
)
def test_a_file_in_the_folder_of_the_base_is_never_replaced(run, delta, argv):
    Path("folder").mkdir()
    Path("base.safetensors").rename("folder/model.safetensors")
    before = files()
    check_refusal(run(*argv, "folder/model.safetensors"), 2, "is a file of BASE folder")
    assert files() == before


def damage_nan(base, tuned):
    tuned["layers.0.up.weight"][3, 4] = torch.nan
    save_file(tuned, "tuned.safetensors")


def damage_names(base, tuned):
    save_file({f"x{name}y": tensor for name, tensor in tuned.items()}, "tuned.safetensors")


def damage_base(base, tuned):
    base["norm.bias"][0] += 1
    save_file(base, "base.safetensors")


def damage_truncate(base, tuned):
    if Path("delta.safetensors").exists():
        os.truncate("delta.safetensors", Path("delta.safetensors").stat().st_size - 9)


def damage_version(base, tuned):
    raw = Path("delta.safetensors").read_bytes()
    Path("delta.safetensors").write_bytes(raw.replace(rb"\"format\":1", rb"\"format\":9"))


def damage_nothing(base, tuned):
    pass


COMPRESS, APPLY = ["compress", "base.safetensors", "tuned.safetensors"], ["apply", "base.safetensors"]
FAILURES = {
    "missing base": (damage_nothing, ["compress", "no.safetensors", "tuned.safetensors", "out"], "does not exist"),
    "base to apply to is missing": (
        damage_nothing,
        ["apply", "no", "delta.safetensors", "o.safetensors"],
        "no does not",
    ),
    "NaN": (damage_nan, [*COMPRESS, "out"], "'layers.0.up.weight' holds NaN", "Lossless()"),
    "base equals fine-tuned": (damage_nothing, ["compress", "base.safetensors", "base.safetensors", "out"], "equals"),
    "nothing pairs": (damage_names, [*COMPRESS, "out"], "no tensor of tuned.safetensors fits one of base.safetensors"),
    "no folder": (damage_nothing, [*COMPRESS, "no/out"], "there is no folder no"),
    "OUT is a folder": (damage_nothing, [*COMPRESS, "."], "cannot be written"),
    "no folder to merge into": (damage_nothing, [*APPLY, "delta.safetensors", "no/o.safetensors"], "no folder no"),
    "wrong base": (damage_base, [*APPLY, "delta.safetensors", "o.safetensors"], "is not the base", "'norm.bias'"),
    "verify, wrong base": (damage_base, ["verify", "base.safetensors", "delta.safetensors"], "is not the base"),
    "truncated": (damage_truncate, [*APPLY, "delta.safetensors", "o.safetensors"], "delta.safetensors: size:"),
    "inspect, truncated": (damage_truncate, ["inspect", "delta.safetensors"], "delta.safetensors: size:"),
    "newer format": (damage_version, ["verify", "base.safetensors", "delta.safetensors"], "found 9", "pip install -U"),
    "no delta": (damage_nothing, ["inspect", "base.safetensors"], "not a delta file"),
    "missing delta": (damage_nothing, ["inspect", "no.safetensors"], "no.safetensors: cannot be read"),
}


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_sentence_and_leaves_nothing_behind(run, delta, pair, case, as_json):
    damage, argv, *words = FAILURES[case]
    damage(*pair)
    before = files()
    check_refusal(run(*argv, *(["--json"] if as_json else [])), 1, *words)
    assert files() == before


def test_an_interrupt_is_code_130(run, delta, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = files()
    monkeypatch.setattr(commands, "load", interrupt)
    check_refusal(run("apply", "base.safetensors", delta, "merged.safetensors"), 130, "interrupted")
    assert files() == before


def test_an_interrupt_in_the_middle_of_writing_leaves_nothing_behind(run, delta, monkeypatch):
    from dtrain.cli import checkpoint

    before, patch = files(), checkpoint.patch

    def interrupt(record, base, origin):
        if record.name == "layers.1.up.weight":
            raise KeyboardInterrupt
        return patch(record, base, origin)

    monkeypatch.setattr(checkpoint, "patch", interrupt)
    check_refusal(run("apply", "base.safetensors", delta, "merged.safetensors"), 130, "interrupted")
    assert files() == before
