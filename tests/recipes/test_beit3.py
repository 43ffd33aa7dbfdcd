"""The multiway transformer against torchscale's recorded numbers and timm's vision tower, and what it is made of."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

import dtrain
from parts.beit3 import BASE, LARGE, POSITIONS, Beit3, Beit3Config, Beit3ForPairs, config_of, resize_positions
from parts.beit3_base import load_backbone, load_beit3
from tests.recipes import torchscale_golden

SIZES = Beit3Config(**torchscale_golden.SIZES)


@pytest.fixture(scope="module")
def model():
    made = Beit3(SIZES).eval()
    made.load_state_dict(torchscale_golden.weights({name: value.shape for name, value in made.state_dict().items()}))
    return made


@pytest.mark.parametrize("name", torchscale_golden.calls())
@torch.no_grad()
def test_it_computes_what_torchscale_computes(model, name):
    arguments = torchscale_golden.calls()[name]
    found, golden = model(**arguments), load_file(torchscale_golden.GOLDEN)[name]
    real = torch.ones(found.shape[:2], dtype=torch.bool)
    if "padding" in arguments:  # torchscale sets padding to zero before the first layer; nothing ever looks at it
        real[:, -7:] = ~arguments["padding"]
    assert 0.5 < golden.std() < 2
    torch.testing.assert_close(found[real], golden[real], atol=1e-5, rtol=0)


def test_what_is_hidden_or_padding_has_no_say(model):
    images, tokens, padding, masked = torchscale_golden.inputs()
    real = torch.cat((torch.ones(3, model.image_tokens, dtype=torch.bool), ~padding), dim=1)
    before = model(images, tokens, padding)
    assert torch.equal(model(images, tokens.masked_fill(padding, 7), padding)[real], before[real])
    changed = images.clone()
    changed[:, :, :2, 2:4] += 1  # the second patch
    hidden = torch.zeros_like(masked)
    hidden[:, 1] = True
    assert torch.equal(model(changed, masked=hidden), model(images, masked=hidden))
    assert not torch.equal(model(changed), model(images))


def timm_tower(weights):
    """Return timm's vision tower of these sizes, with the weights converted by timm's own code."""
    tower = VisionTransformer(
        img_size=SIZES.image_size,
        patch_size=SIZES.patch_size,
        embed_dim=SIZES.width,
        depth=SIZES.depth,
        num_heads=SIZES.heads,
        num_classes=0,
        global_pool="avg",
        scale_attn_norm=True,
        scale_mlp_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    converted = checkpoint_filter_fn({"model": weights}, tower)
    missing, extra = tower.load_state_dict(converted, strict=False)
    assert (set(missing), set(extra)) == ({"fc_norm.weight", "fc_norm.bias"}, {"layer_norm.weight", "layer_norm.bias"})
    return tower.eval()


@torch.no_grad()
def test_its_vision_tower_is_timms():
    torch.manual_seed(1)
    model = Beit3(SIZES).eval()
    for weight in model.parameters():
        weight.normal_(std=0.3)
    tower = timm_tower({f"beit3.{name}": value for name, value in model.state_dict().items()})
    images = torch.randn(4, 3, 8, 8)
    expected = model.encoder.layer_norm.A(tower.forward_features(images))  # timm norms after pooling, or not at all
    assert 0.1 < expected.std() < 10
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("config", "backbone"), [(BASE, 221e6), (LARGE, 673e6)], ids=["base", "large"])
def test_the_official_sizes(config, backbone):
    with torch.device("meta"):
        model = Beit3ForPairs(config)
    assert sum(weight.numel() for weight in model.beit3.parameters()) == pytest.approx(backbone, rel=0.01)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    width = config.width
    expected = {
        "beit3.text_embed.weight": [64010, width],
        "beit3.vision_embed.cls_token": [1, 1, width],
        "beit3.vision_embed.mask_token": [1, 1, width],
        "beit3.vision_embed.proj.weight": [width, 3, 16, 16],
        "beit3.encoder.embed_positions.A.weight": [199, width],
        "beit3.encoder.embed_positions.B.weight": [1024, width],
        "beit3.encoder.layers.0.self_attn.k_proj.A.weight": [width, width],
        "beit3.encoder.layers.0.self_attn.inner_attn_ln.B.weight": [width],
        "beit3.encoder.layers.0.self_attn_layer_norm.A.bias": [width],
        "beit3.encoder.layers.11.ffn.B.fc1.weight": [4 * width, width],
        "beit3.encoder.layers.11.ffn.A.ffn_layernorm.weight": [4 * width],
        "beit3.encoder.layers.11.final_layer_norm.B.weight": [width],
        "beit3.encoder.layer_norm.A.weight": [width],
        "head.norm1.weight": [4 * width],
        "head.dense1.weight": [2 * width, 4 * width],
        "head.norm2.bias": [2 * width],
        "head.dense2.weight": [2, 2 * width],
    }
    assert expected.items() <= shapes.items()
    meta = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("beit3.")}
    assert replace(config_of(meta, "here"), heads=config.heads) == config


def test_both_images_are_read_alike_and_not_mixed_up():
    torch.manual_seed(2)
    model = Beit3ForPairs(SIZES).eval()
    left, right = torch.randn(2, 3, 3, 8, 8)
    _, tokens, padding, _ = torchscale_golden.inputs()
    seen = []
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model(left, right, tokens, padding)
    model(right, left, tokens, padding)
    width = SIZES.width
    torch.testing.assert_close(seen[0], seen[1].roll(2 * width, dims=1))
    alone = model.beit3(left, tokens, padding)
    torch.testing.assert_close(seen[0][:, :width], alone[:, 0])
    torch.testing.assert_close(seen[0][:, width : 2 * width], alone[:, model.beit3.image_tokens])


def test_every_weight_gets_a_gradient():
    model = Beit3ForPairs(SIZES)
    _, tokens, padding, _ = torchscale_golden.inputs()
    model(*torch.randn(2, 3, 3, 8, 8), tokens, padding).square().sum().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {"beit3.vision_embed.mask_token"}


def test_drop_path_grows_with_depth_and_rests_in_evaluation():
    model = Beit3(replace(SIZES, drop_path=0.9, depth=3))
    assert [layer.drop_path.p for layer in model.encoder.layers] == [0, 0.45, 0.9]
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))


def official(path, model, **others):
    """Write a checkpoint in the layout of the original's."""
    torch.save({"model": {f"beit3.{name}": value for name, value in model.state_dict().items()} | others}, path)
    return path


def test_a_checkpoint_of_another_image_size_is_interpolated(tmp_path):
    big = Beit3(replace(SIZES, image_size=12))
    path = official(tmp_path / "big.pth", big, **{"mlm_head.weight": torch.zeros(40, 32)})
    (tmp_path / "config.json").write_text('{"heads": 4}')
    model = load_beit3(str(path), 8, 2)
    assert model.beit3.config == SIZES
    for name, tensor in model.beit3.state_dict(prefix="beit3.").items():
        if name != POSITIONS:
            assert torch.equal(tensor, big.state_dict(prefix="beit3.")[name]), name
    table = model.beit3.encoder.embed_positions.A.weight
    assert torch.equal(table[:3], big.encoder.embed_positions.A.weight[:3])  # two unused, and the class token's
    assert table.shape == (19, 32)


def test_interpolated_positions_stay_where_they_were():
    row, column = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    ramp = torch.stack((row, column), dim=-1).reshape(-1, 2)
    table = torch.cat((torch.tensor([[7.0, 7], [8, 8], [9, 9]]), ramp))
    assert torch.equal(resize_positions(table, 12), table)
    wide = resize_positions(table, 24)
    assert torch.equal(wide[:3], table[:3])
    inner = wide[3:].reshape(24, 24, 2)[6:18, 6:18]
    places = (torch.arange(6, 18) + 0.5) / 2 - 0.5
    expected = torch.stack(torch.meshgrid(places, places, indexing="ij"), dim=-1)
    torch.testing.assert_close(inner, expected, atol=0.05, rtol=0)  # the cubic of torch is not exact on a plane


def test_what_is_no_beit3_is_refused(tmp_path):
    save_file({"layer.weight": torch.zeros(3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(dtrain.InputError, match=r"vision_embed.proj.weight.*'layer.weight' is one of its tensors"):
        load_beit3(str(tmp_path / "other.safetensors"), 8, 2)
    with pytest.raises(dtrain.InputError, match=r"no checkpoint at none.pth.*--preset offline"):
        load_beit3("none.pth", 8, 2)
    path = official(tmp_path / "odd.pth", Beit3(replace(SIZES, width=64)))
    with pytest.raises(dtrain.InputError, match="patches of 2 pixels"):
        load_beit3(str(path), 9, 2)
    state = {f"beit3.{name}": value for name, value in Beit3(SIZES).state_dict().items()}
    name = "beit3.encoder.layers.1.ffn.B.fc1.bias"
    lost = dtrain.read_weights({key: value for key, value in state.items() if key != name})
    with pytest.raises(dtrain.InputError, match=r"ffn\.B\.fc1\.bias of \[128\], the file has no such tensor"):
        load_backbone(Beit3ForPairs(SIZES), lost)


def test_the_output_norm_may_be_missing(tmp_path):
    state = {f"beit3.{name}": value for name, value in Beit3(SIZES).state_dict().items()}
    kept = {name: value + 1 for name, value in state.items() if "encoder.layer_norm" not in name}
    model = Beit3ForPairs(SIZES)
    load_backbone(model, dtrain.read_weights(kept))
    assert all(torch.equal(value, kept.get(name, value)) for name, value in model.state_dict().items())
    assert torch.equal(model.beit3.encoder.layer_norm.B.weight, torch.ones(32))


def test_an_image_of_another_size_is_refused(model):
    with pytest.raises(dtrain.InputError, match="the images are 16 x 16, the model takes 8 x 8"):
        model(torch.zeros(1, 3, 16, 16))
