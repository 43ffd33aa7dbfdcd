import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain.advice import Measures, choices, show
from dtrain.cli import main
from dtrain.cli.parser import parse
from tests.advice.pairs import KINDS, gaussian, pair, product
from tests.lora import adapters

# --- what to run, and what it weighs


@pytest.mark.parametrize("keep", [0.1, 0.03, 0.01, 0.003])
@pytest.mark.parametrize(
    ("method", "bits", "indexed"),
    [
        (lambda keep: dtrain.Dare(keep=keep), 16, False),
        (lambda keep: dtrain.Dare(keep=keep, values="sign"), 1, False),
        (lambda keep: dtrain.DareX(keep=keep, q="norm"), 16, False),
        (lambda keep: dtrain.SeededSign(keep=keep), 1, False),
        (lambda keep: dtrain.Magnitude(keep=keep), 16, True),
    ],
    ids=["Dare", "Dare sign", "DareX", "SeededSign", "Magnitude"],
)
def test_estimates_are_near_the_file(method, bits, indexed, keep):
    base, tuned = pair(gaussian(1e-3), rows=300, columns=500, layers=12)
    expected = dtrain.advise(base, tuned).sizes.expect(keep, bits, indexed=indexed)
    report = dtrain.compress(base, tuned, method(keep)).report()
    assert expected.file_bytes == pytest.approx(report.file_bytes, rel=0.05, abs=500)
    assert expected.ratio == pytest.approx(report.checkpoint_bytes / expected.file_bytes)


@pytest.mark.parametrize("case", KINDS)
def test_what_is_recommended_can_be_pasted(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, state in zip(("my base.safetensors", "tuned.safetensors"), pair(KINDS[case][0]), strict=True):
        save_file(state, name)
    advice = dtrain.advise("my base.safetensors", Path("tuned.safetensors"))
    for choice in advice.choices:
        method = eval(choice.method, {"dtrain": dtrain})  # noqa: S307 - this is what pasting does
        assert bool(choice.data) == (method.needs != "nothing")
        assert bool(choice.command) == (not choice.data)
        if choice.command:
            parsed = parse(shlex.split(choice.command)[1:]).arguments
            assert parsed["method"] == method
            assert (parsed["base"], parsed["finetuned"]) == ("my base.safetensors", "tuned.safetensors")
            assert main(shlex.split(choice.command)[1:]) == 0
            if choice.expected:
                size = Path("delta.safetensors").stat().st_size
                assert choice.expected.file_bytes == pytest.approx(size, rel=0.05, abs=500), choice


@pytest.mark.parametrize(
    ("elements", "keep", "signs"), [(10**5, 0.3, 0.3), (10**6, 0.1, 0.3), (10**7, 0.03, 0.1), (10**10, 0.01, 0.03)]
)
def test_the_keep_rate_to_begin_with_falls_with_the_size(elements, keep, signs):
    advice = dtrain.advise(*pair(gaussian(1e-3), layers=1))
    (tensor,) = advice.measures.tensors
    grown = replace(tensor, shape=(elements // 1000, 1000), changed=elements, absolute=1e-3 * elements)
    measures = Measures((replace(grown, energy=1.6e-6 * elements, base_energy=4e-4 * elements),))
    assert choices.start_keep(measures) == keep
    chooser = choices.Chooser("BASE", "FINETUNED", dtrain.Rules(), advice.sizes)
    found = [choice.method for choice in choices.choose(measures, chooser, "encoder", keep)]
    assert f"dtrain.SeededSign(keep={signs})" in found
    assert f'dtrain.DareX(keep={keep}, scope="layer")' in found


def test_the_rules_are_measured_with_and_go_into_the_command():
    rules = dtrain.Rules(drop=["encoder.layer.0.*"], whole=[])
    advice = dtrain.advise(*pair(gaussian(1e-3)), rules)
    assert [tensor.name for tensor in advice.measures.tensors] == [f"encoder.layer.{i}.dense.weight" for i in (1, 2)]
    assert advice.choices[0].command.endswith("--whole --drop 'encoder.layer.0.*'")
    assert advice.choices[0].command.startswith("dtrain compress BASE FINETUNED ")


def test_the_adapter_s_factors_fit_the_recommended_budget():
    base, tuned = pair(product(4, 1e-3), rows=256, columns=384)
    advice = dtrain.advise(base, tuned)
    method = eval(advice.choices[-1].method, {"dtrain": dtrain})  # noqa: S307
    merged = dtrain.compress(base, tuned, method).state_dict(base)
    for tensor in advice.measures.tensors:
        delta, rest = tuned[tensor.name] - base[tensor.name], tuned[tensor.name] - merged[tensor.name]
        assert float(rest.norm() / delta.norm()) < 0.02


# --- doors


def test_a_prefix_and_a_module_change_nothing():
    base, tuned = pair(gaussian(1e-3))
    plain = dtrain.advise(base, tuned).as_dict()
    wrapped = {f"model.{name}" if name != "head.weight" else name: value for name, value in tuned.items()}
    assert dtrain.advise(base, wrapped).as_dict() == plain


@pytest.mark.parametrize("base", [torch.zeros(32, 32), torch.randn(32, 32)], ids=["zero", "random"])
def test_json_has_everything_and_no_nan(base):
    advice = dtrain.advise({"w": base}, {"w": base + 1e-3 * torch.randn(32, 32)})
    data = json.loads(json.dumps(advice.as_dict(), allow_nan=False))
    assert data["measures"]["mean_abs"] == advice.measures.mean_abs
    assert data["steps"][3]["question"] == "Are the deltas large?"
    assert len(data["expected"]) == 8
    assert data["choices"][0]["method"] == advice.choices[0].method


def test_print_shows_it_all():
    advice = dtrain.advise(*pair(gaussian(3e-4)))
    text = str(advice)
    for step in advice.steps:
        assert f"{step.question} {step.answer}." in text
    for choice in advice.choices:
        assert choice.method in text
        assert choice.command in text  # never broken
    for item in advice.expected:
        assert f"{item.file_bytes:,} bytes" in text
    assert all(row.role in show.ROLES for row in advice.sizes.roles)


def test_the_command_line_says_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, state in zip(("base.safetensors", "tuned.safetensors"), pair(gaussian(3e-4)), strict=True):
        save_file(state, name)
    rules = dtrain.Rules(drop=["*.1.*"])
    advice = dtrain.advise("base.safetensors", "tuned.safetensors", rules)
    assert main(["advise", "base.safetensors", "tuned.safetensors", "--drop", "*.1.*", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "base": "base.safetensors",
        "finetuned": "tuned.safetensors",
        **json.loads(json.dumps(advice.as_dict())),
    }
    assert main(["advise", "base.safetensors", "tuned.safetensors", "--drop", "*.1.*"]) == 0
    shown = capsys.readouterr()
    assert advice.choices[0].command in shown.out
    assert shown.err == ""


def test_an_adapter_is_a_fine_tuned_model_but_zeros_are_no_base(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(adapters.base(), "base.safetensors")
    adapters.write(tmp_path / "adapter")
    assert main(["advise", "base.safetensors", "adapter", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [tensor["spectrum"]["rank"] for tensor in data["measures"]["tensors"]] == [2, 2]
    assert main(["advise", "zeros", "adapter"]) == 2
    assert "BASE zeros leaves no delta to measure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda state: state["encoder.layer.1.dense.weight"].fill_(math.nan),
            r"'encoder\.layer\.1\.dense\.weight' holds NaN",
        ),
        (lambda state: state.update({f"x{name}y": state.pop(name) for name in [*state]}), "no tensor of"),
    ],
)
def test_what_compress_refuses_is_refused(damage, words):
    base, tuned = pair(gaussian(1e-3))
    damage(tuned)
    with pytest.raises(dtrain.InputError, match=words):
        dtrain.advise(base, tuned)
