"""What is no plain LoRA adapter is refused with a sentence."""

import json

import pytest
import torch
from safetensors.torch import save_file

import dtrain
from dtrain import InputError
from dtrain.lora import read_adapter
from tests.lora.adapters import CONFIG, PREFIX, SCALING, base, factors, write
from tests.methods.settings import same_bits

UP = PREFIX + "enc.up"


def without(name):
    return {key: value for key, value in factors().items() if key != name}


TENSORS = {
    "no factors": ({PREFIX + "enc.up.bias": torch.zeros(6)}, "holds no LoRA factors"),
    "no prefix": ({"enc.up.lora_A.weight": torch.zeros(2, 4)}, "'enc.up.lora_A.weight' does not start with"),
    "name of the adapter inside": (
        factors() | {UP + ".lora_A.default.weight": torch.zeros(2, 4)},
        "none of the factors",
    ),
    "magnitudes": (
        factors() | {UP + ".lora_magnitude_vector": torch.zeros(6)},
        "lora_magnitude_vector' is none of the",
    ),
    "no B": (without(UP + ".lora_B.weight"), "'enc.up' has lora_A.weight where lora_A.weight and lora_B.weight were"),
    "no A": (without(UP + ".lora_A.weight"), "'enc.up' has lora_B.weight where"),
    "two sorts": (
        factors() | {UP + ".lora_embedding_A": torch.zeros(2, 4)},
        "'enc.up' has lora_A.weight, lora_B.weight,",
    ),
    "other rank": (factors(rank=3), r"'enc.down' are \(3, 6\) and \(4, 3\), where the configuration says rank 2"),
    "one dimension": (factors() | {UP + ".lora_A.weight": torch.zeros(2)}, r"'enc.up' are \(2,\) and"),
    "ranks that differ": (factors() | {UP + ".lora_B.weight": torch.zeros(6, 3)}, r"\(2, 4\) and \(6, 3\)"),
    "B with a kernel": (factors() | {UP + ".lora_B.weight": torch.zeros(6, 2, 3, 3)}, r"\(6, 2, 3, 3\)"),
}


@pytest.mark.parametrize(("state", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors_that_are_no_adapter(state, message, tmp_path):
    for source in ((state, CONFIG), write(tmp_path, state)):
        with pytest.raises(InputError, match=message):
            dtrain.lora_factors(source)
        with pytest.raises(InputError, match=message):
            dtrain.lora_product(base(), source)


CONFIGS = {
    "DoRA": ({"use_dora": True}, "sets use_dora=True, so it may be more than"),
    "MoE": ({"target_parameters": ["experts"]}, r"sets target_parameters=\['experts'\]"),
    "tokens": ({"trainable_token_indices": [1]}, "sets trainable_token_indices"),
    "layers twice": ({"layer_replication": [[0, 2], [1, 3]]}, "sets layer_replication"),
    "activated": ({"alora_invocation_tokens": [4]}, "sets alora_invocation_tokens"),
    "of the future": ({"use_zora": True}, "sets use_zora=True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "sets init_lora_weights='pissa'"),
    "LoftQ": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "sets loftq_config="),
    "IA3": ({"peft_type": "IA3"}, "an adapter of type 'IA3'; dtrain reads 'LORA'"),
    "no type": ({"peft_type": None}, "an adapter of type None"),
    "r = 0": ({"r": 0}, "r and rank_pattern must be positive integers, got 0"),
    "no r": ({"r": None}, "r and rank_pattern must be positive integers, got None"),
    "r = 2.5": ({"rank_pattern": {"up": 2.5}}, "r and rank_pattern must be positive integers, got 2.5"),
    "alpha": ({"lora_alpha": "much"}, "lora_alpha and alpha_pattern must be numbers, got 'much'"),
    "alpha = True": ({"alpha_pattern": {"up": True}}, "must be numbers, got True"),
    "list of ranks": ({"rank_pattern": [2]}, r"rank_pattern must be an object, got \[2\]"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, r"alpha_pattern has '\(', which is no pattern"),
    "one saved module": ({"modules_to_save": "head"}, "modules_to_save must be a list of names, got 'head'"),
}


@pytest.mark.parametrize(("entries", "message"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configurations_that_are_not_of_plain_lora(entries, message, tmp_path):
    for source in ((factors(), CONFIG | entries), write(tmp_path, config=CONFIG | entries)):
        with pytest.raises(InputError, match=message):
            dtrain.lora_factors(source)
        with pytest.raises(InputError, match=message):
            dtrain.lora_product(base(), source)


def test_a_configuration_that_json_cannot_hold():
    with pytest.raises(InputError, match="the configuration is no plain JSON"):
        dtrain.lora_factors((factors(), CONFIG | {"eva_config": object()}))


FOLDERS = {
    "not there": (lambda path: path / "none", "none holds no adapter_config.json"),
    "a file": (lambda path: path / "a" / "adapter_config.json", "holds no adapter_config.json"),
    "no weights": (
        lambda path: (path / "a" / "adapter_model.safetensors").unlink(),
        "holds no adapter_model.safetensors",
    ),
    "text": (lambda path: (path / "a" / "adapter_config.json").write_text("hello"), "adapter_config.json is no JSON"),
    "bytes": (lambda path: (path / "a" / "adapter_config.json").write_bytes(b"\xff"), "adapter_config.json is no JSON"),
    "a list": (lambda path: (path / "a" / "adapter_config.json").write_text("[]"), "is no configuration of PEFT"),
    "cut": (
        lambda path: (path / "a" / "adapter_model.safetensors").write_bytes(b"cut"),
        "cannot be read as safetensors",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_that_hold_no_adapter(damage, message, tmp_path):
    write(tmp_path / "a")
    found = damage(tmp_path)
    with pytest.raises(InputError, match=message):
        read_adapter(found if isinstance(found, type(tmp_path)) else tmp_path / "a")


def test_an_adapter_is_no_model(tmp_path):
    write(tmp_path / "a")
    for call in (
        lambda: dtrain.read_weights(tmp_path / "a"),
        lambda: dtrain.compress(None, tmp_path / "a", dtrain.Dare()),
    ):
        with pytest.raises(InputError, match=r"a is a PEFT adapter, and no model by itself. Give dtrain.lora_product"):
            call()
    model = dict(sorted(base().items()))
    save_file(model, tmp_path / "a" / "model.safetensors")  # beside a model an adapter is not asked for
    assert same_bits(dtrain.read_weights(tmp_path / "a").tensors, model)


def test_an_adapter_is_read_as_it_is(tmp_path):
    state = factors() | {PREFIX + "enc.up.base_layer.bias": torch.ones(6), UP + ".lora_B.bias": torch.ones(6)}
    config = CONFIG | {"target_modules": {"up", "down"}, "rank_pattern": {}, "revision": None}
    for source in ((state, config), write(tmp_path, state, config | {"target_modules": ["down", "up"]}), str(tmp_path)):
        read = read_adapter(source)
        assert same_bits(read.tensors, dict(sorted(state.items())))
        assert read.whole == {PREFIX + "enc.up.base_layer.bias"}
        assert [(target.module, target.scaling) for target in read.targets] == [
            ("enc.down", SCALING),
            ("enc.up", SCALING),
        ]
        assert read.config == CONFIG | {"target_modules": ["down", "up"], "rank_pattern": {}}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("bert-base-uncased", True), ("FacebookAI/roberta-base", True), ("org/name.v1_2", True),
        ("/models/roberta", False), ("./models", False), ("../models", False), ("models/a/b", False),
        ("~/models", False), ("C:\\models", False), ("there", False), ("there/model", False), ("", False),
    ],
)  # fmt: skip
def test_the_base_is_named_only_by_a_hub_id(name, kept, tmp_path, monkeypatch):
    (tmp_path / "there" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = read_adapter((factors(), CONFIG | {"base_model_name_or_path": name})).config
    assert config.get("base_model_name_or_path") == (name if kept else None)
    assert kept or not name or name not in json.dumps(config)
