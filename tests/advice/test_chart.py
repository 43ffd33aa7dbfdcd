import math

import pytest
import torch

import dtrain
from dtrain.advice import architecture, chart, measure, verdict
from tests.advice.pairs import KINDS, gaussian, pair, product


def answers(advice):
    return {step.question: step.answer for step in advice.steps}


@pytest.mark.parametrize("case", KINDS)
def test_the_chart_ends_in_the_method_for_the_delta(case):
    change, large, method = KINDS[case]
    advice = dtrain.advise(*pair(change))
    assert answers(advice).get("Are the deltas large?") == large
    assert advice.choices[0].method.startswith(f"dtrain.{method}(")
    assert all(step.because and step.source for step in advice.steps)


def test_the_first_question_is_the_paper_s():
    first = dtrain.advise(*pair(gaussian(1e-3))).steps[0]
    assert (first.question, first.answer) == ("May training still change?", "only you know")
    assert "AdamR" in first.because


def test_answers_carry_the_numbers_they_rest_on():
    advice = dtrain.advise(*pair(gaussian(3e-4)))
    large = next(step for step in advice.steps if step.question == "Are the deltas large?")
    assert f"mean |D| is {chart.short(advice.measures.mean_abs)} (large: 0.01)" in large.because
    assert f"||D|| / ||W0|| is {chart.short(advice.measures.relative)} (large: 0.5)" in large.because
    assert "a reading" in large.source


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_merged_adapter_is_recognised_under_its_rounding(dtype):
    advice = dtrain.advise(*pair(product(4, 1e-3), dtype=dtype))
    assert {tensor.spectrum.rank for tensor in advice.measures.tensors} == {4}
    assert answers(advice)["Is it a merged adapter?"] == "it looks like one"
    size = 3 * 2 * 4 * (64 + 96)
    assert any(f"{size:,} bytes of factors" in step.because for step in advice.steps)


def test_what_rounding_hides_is_no_adapter():
    advice = dtrain.advise(*pair(product(4, 3e-5), dtype=torch.bfloat16))
    assert all(tensor.spectrum.rounding > 0.1 for tensor in advice.measures.tensors)
    assert answers(advice)["Is it a merged adapter?"] == "no"


def test_one_full_matrix_is_enough_for_no_adapter():
    base, tuned = pair(product(4, 1e-3))
    name = "encoder.layer.1.dense.weight"
    tuned[name] = base[name] + gaussian(1e-3)(base[name].shape)
    step = next(step for step in dtrain.advise(base, tuned).steps if "adapter" in step.question)
    assert step.answer == "no"
    assert name in step.because


def test_without_spectra_the_chart_says_so(monkeypatch):
    monkeypatch.setattr(measure, "within_budget", lambda shapes: set())
    advice = dtrain.advise(*pair(gaussian(1e-3)))
    assert answers(advice)["Is it a merged adapter?"] == "not measured"
    assert "8-bit factors" not in next(step.because for step in advice.steps if "one bit" in step.question)
    assert "stable rank" not in str(advice)


@pytest.mark.parametrize(
    ("change", "answer"),
    [
        (gaussian(1e-3), "signs"),
        (product(2, 1e-3), "factors"),
        (
            lambda shape: gaussian(1e-3)(shape) * (torch.arange(shape[0]) < 32).view(-1, *[1] * (len(shape) - 1)),
            "patches",
        ),
    ],
)
def test_which_code_suits_the_delta(change, answer):
    assert answers(dtrain.advise(*pair(change)))["Which code suits it at one bit per weight?"] == answer


def test_two_bits_keep_of_a_patch_what_the_constant_says():
    patches = torch.randn(20_000, 256)
    low, high = patches.amin(1, True), patches.amax(1, True)
    coded = ((patches - low) / (high - low) * 3).round() / 3 * (high - low) + low
    cosine = (patches * coded).sum(1) / (patches.norm(dim=1) * coded.norm(dim=1))
    assert float(cosine.square().mean()) == pytest.approx(verdict.TWO_BITS, abs=0.002)


def test_untouched_rows_are_named_with_what_they_cost():
    base = {"words.weight": torch.randn(200, 32), "up.weight": torch.randn(64, 64)}
    tuned = {name: value + gaussian(1e-3)(value.shape) for name, value in base.items()}
    tuned["words.weight"][50:] = base["words.weight"][50:]
    advice = dtrain.advise(base, tuned)
    step = next(step for step in advice.steps if "untouched" in step.question)
    assert "75% of the 200 rows of words.weight" in step.because
    assert f"{math.ceil(2 * 0.3 * 200 * 32):,} bytes" in step.because
    dropped = dtrain.advise(base, tuned, dtrain.Rules(drop=["words.weight"]))
    saved = advice.sizes.expect(0.3, 16).file_bytes - dropped.sizes.expect(0.3, 16).file_bytes
    assert saved == math.ceil(2 * 0.3 * 200 * 32)


ARCHITECTURES = {
    "encoder.layer.0.attention.self.query.weight": "encoder",
    "bert.encoder.layer.11.output.dense.weight": "encoder",
    "distilbert.transformer.layer.0.ffn.lin1.weight": "encoder",
    "vision_model.encoder.layers.3.self_attn.q_proj.weight": "encoder",
    "patch_embed.proj.weight": "encoder",
    "model.layers.0.self_attn.q_proj.weight": "decoder",
    "gpt_neox.layers.7.attention.dense.weight": "decoder",
    "transformer.h.0.attn.c_attn.weight": "decoder",
    "model.decoder.layers.0.fc1.weight": "decoder",
    "lm_head.weight": "decoder",
    "conv1.weight": "unknown",
    "layers.0.weight": "unknown",
}


@pytest.mark.parametrize(("name", "expected"), ARCHITECTURES.items(), ids=ARCHITECTURES)
def test_the_architecture_is_guessed_from_names(name, expected):
    assert architecture.guess_architecture(["x.weight", name]) == expected


def test_a_model_of_two_halves_is_both():
    names = ["encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.block.0.layer.0.SelfAttention.q.weight"]
    assert architecture.guess_architecture(names) == "both"


@pytest.mark.parametrize(("prefix", "scope"), [("encoder.layer", "layer"), ("h", "model")])
def test_the_architecture_decides_the_scope(prefix, scope):
    base, tuned = (
        {name.replace("encoder.layer", prefix): value for name, value in state.items()}
        for state in pair(gaussian(1e-3))
    )
    fitted = [choice.method for choice in dtrain.advise(base, tuned).choices if choice.data.startswith("objective")]
    assert len(fitted) == 2
    assert all(f'scope="{scope}"' in method for method in fitted)
