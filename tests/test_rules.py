"""What becomes of a tensor, by its name, shape and dtype alone."""

import pytest
import torch

from dtrain import InputError, Rules
from dtrain.rules import HEADS, PATTERNS, matches

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "role"),
    [
        ("encoder.weight", (4, 4), F32, "method"),
        ("encoder.weight", (4, 4), BF16, "method"),
        ("encoder.weight", (4, 4), F16, "method"),
        ("encoder.weight", (4, 4), F64, "method"),
        ("conv.weight", (8, 3, 3, 3), F32, "method"),
        ("conv.weight", (8, 1, 3, 3), F32, "method"),
        ("depthwise.weight", (8, 1, 1, 1), F32, "vector"),
        ("cls_token", (1, 1, 768), F32, "half"),
        ("norm.weight", (768,), F32, "vector"),
        ("norm.bias", (768,), BF16, "vector"),
        ("bias", (768,), F32, "vector"),
        ("bn.running_var", (768,), F32, "half"),
        ("encoder.bias_table", (768,), F32, "half"),
        ("bert.embeddings.word_embeddings.weight", (9, 4), F32, "embedding"),
        ("word_embeddings.weight", (9, 4), F16, "embedding"),
        ("bert.embeddings.word_embeddings.weight", (9, 4), torch.int8, "bits"),
        ("bert.embeddings.position_embeddings.weight", (9, 4), F32, "method"),
        ("model.embed_tokens.weight", (9, 4), F32, "method"),
        ("embeddings.word_embeddings.weight_scale", (9, 4), F32, "method"),
        ("scale", (), F32, "half"),
        ("empty", (0, 5), F32, "half"),
        ("bn.num_batches_tracked", (), torch.int64, "bits"),
        ("mask", (4, 4), torch.bool, "bits"),
        ("phase", (4, 4), torch.complex64, "bits"),
        ("fp8", (4, 4), torch.float8_e4m3fn, "bits"),
        ("lm_head.weight", (9, 4), F32, "method"),
        *((name, (2, 4), F32, "whole") for name in ("head.weight", "model.heads.0.bias", "classifier.weight")),
        *((name, (2, 4), F32, "whole") for name in ("fc.weight", "vit.head.bias", "qa_outputs.weight", "score.weight")),
        *((name, (4, 4), F32, "method") for name in ("mlp.fc.weight", "heads_up.weight", "overhead.weight", "Head.w")),
    ],
)
def test_defaults(name, shape, dtype, role):
    assert Rules().role(name, shape, dtype) == role


def test_the_first_rule_that_applies_decides():
    rules = Rules(include=["enc.*"], exclude=["*.1.*"], whole=["top.*", "enc.9.*"], drop=["*.9.*", "pos"])
    found = {name: rules.role(name, (4, 4), F32) for name in ("enc.0.w", "enc.1.w", "enc.9.w", "top.w", "pos", "other")}
    assert found == {
        "enc.0.w": "method", "enc.1.w": "half", "enc.9.w": "drop", "top.w": "whole", "pos": "drop", "other": "half",
    }  # fmt: skip
    assert rules.role("enc.0.steps", (4, 4), torch.int64) == "bits"
    assert rules.role("top.steps", (), torch.int64) == "whole"


@pytest.mark.parametrize(
    ("name", "pattern", "expected"),
    [
        ("a.weight", "a.weight", True),
        ("a.weight", "a", False),
        ("x.a.weight", "a.*", False),
        ("A.weight", "a.*", False),
        ("layer.11.w", "layer.1.*", False),
        ("layer.7.w", "layer.[0-7].*", True),
        ("layer.8.w", "layer.?.w", True),
        ("a\nb", "a*b", True),
    ],
)
def test_patterns_match_the_whole_name(name, pattern, expected):
    assert matches(name, [pattern]) is expected


def test_embeddings_yield_to_drop_and_whole_and_go_before_include():
    name, rules = "word_embeddings.weight", Rules(include=["*"], embeddings=["*embeddings*"])
    assert rules.role(name, (9, 4), F32) == "embedding"
    assert Rules(embeddings=[]).role(name, (9, 4), F32) == "method"
    assert Rules(embeddings=[], exclude=["word*"]).role(name, (9, 4), F32) == "half"
    assert Rules(whole=["word*"]).role(name, (9, 4), F32) == "whole"
    assert Rules(drop=["word*"]).role(name, (9, 4), F32) == "drop"


@pytest.mark.parametrize(("field", "code"), [("vectors", "exact"), ("fresh", "sign"), ("vectors", ["sign"])])
def test_an_unknown_code_is_refused(field, code):
    with pytest.raises(InputError, match=rf"`{field}` must be one of .*float16.*, got "):
        Rules(**{field: code})


@pytest.mark.parametrize("field", PATTERNS)
def test_a_single_string_is_refused(field):
    with pytest.raises(InputError, match=rf"`{field}` must be a list of patterns, got the string 'a\.\*'. Use \['a"):
        Rules(**{field: "a.*"})


def test_rules_are_values():
    assert Rules(drop=["a"]) == Rules(drop=("a",))
    assert hash(Rules(drop=["a"])) == hash(Rules(drop=("a",)))
    assert Rules().whole == HEADS


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(InputError, match=r"`include` has the pattern 'nope\*', which matches no tensor"):
        Rules(include=["nope*"]).check(["a.weight"])
    Rules().check(["a.weight"])  # the default head names need not be there
    Rules(drop=["a.*"]).check(["a.weight"])
