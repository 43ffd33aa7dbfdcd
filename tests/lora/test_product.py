"""The product is the model that PEFT itself merges, whatever sort of layer the adapter is on."""

import copy

import pytest
import torch

import dtrain
from dtrain import InputError, Rules
from tests.lora.adapters import CONFIG, PREFIX, Net, Tied, base, factors, product, trained, write
from tests.methods.settings import same_bits

LINEAR = ["up", "square"]
CASES = {
    "plain": {"target_modules": LINEAR},
    "alpha": {"target_modules": LINEAR, "r": 3, "lora_alpha": 5},
    "alpha is no integer": {"target_modules": LINEAR, "lora_alpha": 2.5},
    "rank-stabilised": {"target_modules": LINEAR, "r": 3, "lora_alpha": 5, "use_rslora": True},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"up": 2}, "alpha_pattern": {"square": 3, "up": 9}},
    "expressions": {"target_modules": LINEAR, "rank_pattern": {"^up": 2, "u.": 5}, "alpha_pattern": {"s.*e": 3}},
    "patterns, rank-stabilised": {"target_modules": LINEAR, "rank_pattern": {"up": 2}, "use_rslora": True},
    "embedding": {"target_modules": ["tokens"], "r": 3},
    "convolutions": {"target_modules": ["image", "line"], "r": 3},
    "bias of the targets": {"target_modules": LINEAR, "bias": "lora_only"},
    "all biases": {"target_modules": LINEAR, "bias": "all"},
    "bias in B": {"target_modules": [*LINEAR, "image"], "lora_bias": True},
    "saved head": {"target_modules": LINEAR, "modules_to_save": ["classifier"]},
    "saved norm": {"target_modules": LINEAR, "modules_to_save": ["norm"]},
    "saved head and all biases": {"target_modules": LINEAR, "modules_to_save": ["classifier"], "bias": "all"},
    "all of it": {
        "target_modules": [*LINEAR, "tokens", "image", "line"], "r": 4, "lora_alpha": 3, "use_rslora": True,
        "modules_to_save": ["classifier"], "bias": "all", "rank_pattern": {"image": 1},
    },
}  # fmt: skip


def check(model, folder, **options):
    adapted = trained(model, folder, **options)
    merged = adapted.merge_and_unload().state_dict()
    weights = dtrain.lora_product(model, folder)
    assert {*weights.tensors, *weights.aliases} == merged.keys()
    for name, expected in merged.items():
        torch.testing.assert_close(weights.get(name), expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    return weights


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_the_product_is_what_peft_merges(options, tmp_path):
    pytest.importorskip("peft")
    check(Net(), tmp_path, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["c_attn"], ["c_proj"], ["c_attn", "c_proj", "c_fc", "wte"]], ids=str)
def test_layers_that_are_stored_turned(targets, tmp_path):
    """GPT-2's are: attn.c_proj is square, so that only the configuration says which way round it is."""
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shape = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=6)
    check(transformers.GPT2Model(shape), tmp_path, target_modules=targets, r=3, task_type="FEATURE_EXTRACTION")


@pytest.mark.filterwarnings("ignore")
def test_a_transformer_with_a_head(tmp_path):
    pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    shape = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, num_labels=3
    )
    model = transformers.BertForSequenceClassification(shape)
    weights = check(model, tmp_path, target_modules=["query", "dense"], task_type="SEQ_CLS")
    # The same adapter on the encoder alone, whose names have no "bert.": the head is fresh there.
    inner = dtrain.lora_product(model.bert, tmp_path)
    assert inner.tensors.keys() == {name.removeprefix("bert.") for name in weights.tensors}
    delta = dtrain.compress(model.bert, inner, dtrain.Lossless())
    assert delta.report().whole == ("classifier.bias", "classifier.weight")
    assert same_bits(delta.state_dict(model.bert), inner.tensors)


@pytest.mark.filterwarnings("ignore")
def test_turned_and_unturned_layers_together(tmp_path):
    """PEFT keeps one flag for all of them: oblong weights show their shape, a square one cannot be told."""
    pytest.importorskip("peft")
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    check(Net(middle=conv1d(12, 12)), tmp_path / "one", target_modules=["middle"])
    oblong = Net()
    oblong.tokens_up = conv1d(5, 8)
    check(oblong, tmp_path / "two", target_modules=["up", "tokens_up"])
    mixed = Net(middle=conv1d(12, 12))
    trained(mixed, tmp_path / "three", target_modules=["up", "middle"])
    with pytest.raises(
        InputError, match=r"fan_in_fan_out=True, which the shape of 'up' contradicts, .* square 'middle'"
    ):
        dtrain.lora_product(mixed, tmp_path / "three")


@pytest.mark.filterwarnings("ignore")
def test_tied_tensors_stay_tied_unless_one_was_saved(tmp_path):
    pytest.importorskip("peft")
    model = Tied()
    assert check(model, tmp_path / "a", target_modules=["tokens"]).aliases == {"tokens.weight": "logits.weight"}
    untied = check(model, tmp_path / "b", target_modules=["tokens"], modules_to_save=["logits"])
    assert untied.aliases == {}
    assert dtrain.lora_product(model, tmp_path / "b").tensors["tokens.weight"].ne(model.tokens.weight).any()


@pytest.mark.filterwarnings("ignore")
def test_the_product_computes_what_the_adapter_computes(tmp_path):
    pytest.importorskip("peft")
    model, ids = Net(), torch.randint(11, (5, 7))
    adapted = trained(model, tmp_path, target_modules=[*LINEAR, "tokens", "image"], modules_to_save=["classifier"])
    delta = dtrain.compress(model, dtrain.lora_product(model, tmp_path), dtrain.Lossless())
    delta.apply_(model)
    torch.testing.assert_close(model(ids), adapted(ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_product_is_rounded_once_to_the_dtype_of_the_base(dtype):
    state, before = factors(), {name: value.to(dtype) for name, value in base().items()}
    merged = dtrain.lora_product(before, (state, CONFIG)).tensors
    wide = {name: value.double() for name, value in state.items()}
    for module in ("enc.up", "enc.down"):
        exact = before[f"{module}.weight"].double() + product(wide, module)
        assert torch.equal(merged[f"{module}.weight"], exact.to(dtype))
    assert merged["enc.up.bias"] is not before["enc.up.bias"]
    assert merged["enc.norm.weight"].data_ptr() == before["enc.norm.weight"].data_ptr()


def test_dropping_in_the_product_is_dare_on_the_product():
    state, before = factors(), base()
    delta = dtrain.compress(before, dtrain.lora_product(before, (state, CONFIG)), dtrain.Dare(keep=0.5))
    after = delta.state_dict(before)
    for module in ("enc.up", "enc.down"):
        change = after[f"{module}.weight"] - before[f"{module}.weight"]
        kept = change != 0
        assert 0 < kept.sum() < kept.numel()
        torch.testing.assert_close(change[kept], 2 * product(state, module)[kept], rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("there", "here"), [("", "model."), ("model.", ""), ("", "a.b."), ("a.b.", "")])
def test_a_prefix_that_only_one_of_them_has(there, here):
    state, before = factors(), base()
    adapter = {name.replace(PREFIX, PREFIX + there): value for name, value in state.items()}
    merged = dtrain.lora_product({here + name: value for name, value in before.items()}, (adapter, CONFIG)).tensors
    expected = dtrain.lora_product(before, (state, CONFIG)).tensors
    assert same_bits(merged, {here + name: value for name, value in expected.items()})


BAD = {
    "no such module": (
        lambda s: {k.replace("enc.up", "enc.left"): v for k, v in s.items()},
        "no tensor 'enc.up.weight'",
    ),
    "two places": (
        lambda s: {f"{p}.{k}": v for p in "ab" for k, v in s.items()},
        "behind several prefixes \\('a.', 'b.'",
    ),
    "other width": (lambda s: s | {"enc.up.weight": torch.randn(6, 5)}, r"'enc.up' by a tensor of shape \(6, 4\)"),
    "quantised": (lambda s: s | {"enc.up.weight": torch.zeros(6, 4).to(torch.int8)}, "'enc.up', which is torch.int8"),
    "float8": (lambda s: s | {"enc.up.weight": torch.zeros(6, 4).to(torch.float8_e5m2)}, "float8_e5m2 in the base"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_another_base_is_refused_with_a_sentence(change, message):
    with pytest.raises(InputError, match=message):
        dtrain.lora_product(change(base()), (factors(), CONFIG))


def test_a_tensor_that_nothing_accounts_for_is_refused():
    state = factors() | {PREFIX + "pool.weight": torch.zeros(2)}
    with pytest.raises(
        InputError, match=r"holds 'base_model.model.pool.weight', but state dict has no tensor 'pool.weight'"
    ):
        dtrain.lora_product(base(), (state, CONFIG))
    saved = dtrain.lora_product(base(), (state, CONFIG | {"modules_to_save": ["pool"]}))
    assert torch.equal(saved.tensors["pool.weight"], torch.zeros(2))
    with pytest.raises(InputError, match=r"no tensor 'enc.down.bias'"):
        dtrain.lora_product(base(), (factors() | {PREFIX + "enc.down.lora_B.bias": torch.zeros(4)}, CONFIG))


def test_the_base_is_left_alone_and_rules_apply(tmp_path):
    before = base()
    kept = copy.deepcopy(before)
    merged = dtrain.lora_product(before, write(tmp_path))
    delta = dtrain.compress(before, merged, dtrain.Dare(), rules=Rules(drop=["*.down.*"]))
    assert same_bits(before, kept)
    assert torch.equal(delta.state_dict(before)["enc.down.weight"], before["enc.down.weight"])
    assert "adapter" not in delta.content.metadata
