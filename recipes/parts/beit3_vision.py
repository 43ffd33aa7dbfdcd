"""BEiT-3's vision tower as timm has it: timm's own, a local folder's, an official checkpoint's, or a small one."""

from pathlib import Path

import timm
import torch
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

import dtrain
from dtrain.errors import InputError
from parts.vision_models import load_vit, pretrain_on_digits

ARCHITECTURE = "beit3_base_patch16_224"  # says how it is built; what is given beside it says how large
DIGITS_BEIT3 = {
    "architecture": ARCHITECTURE,
    "model_args": {"img_size": 8, "patch_size": 2, "embed_dim": 96, "depth": 4, "num_heads": 3, "num_classes": 5},
    "num_classes": 5,
    "pretrained_cfg": {},  # without it timm takes the whole file for one
}
HEAD_WIDTH = 64  # of every BEiT-3 that was published
FRESH = {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}  # what pre-training has no use for


def load_beit3_vision(pretrained: str, num_classes: int) -> VisionTransformer:
    """Return a pre-trained BEiT-3 for images, with a fresh head behind the mean of the patches and a norm.

    Args:
        pretrained: `digits` (pre-trained here and cached), an official checkpoint (.pth), a folder as timm writes it,
            or the name of a timm model, which is downloaded.
        num_classes: Outputs of the fresh head.
    """
    if pretrained == "digits":
        pretrained = str(pretrain_on_digits("beit3_image_digits_base", DIGITS_BEIT3))
    if Path(pretrained).suffix == ".pth":
        return from_official(pretrained, num_classes)
    model = load_vit(pretrained, num_classes)
    if not isinstance(model, VisionTransformer) or isinstance(model.blocks[0].attn.norm, nn.Identity):
        raise InputError(f"{pretrained!r} is no BEiT-3: its attention has no norm inside. Try recipes/vit_cifar.py.")
    return model


def from_official(path: str, num_classes: int) -> VisionTransformer:
    """Return the vision half of an official checkpoint; its sizes follow from the shapes of its tensors."""
    weights = dtrain.read_weights(path)
    tensors = dict(weights.tensors)
    try:
        width, _, patch, _ = tensors["beit3.vision_embed.proj.weight"].shape
        patches = len(tensors["beit3.encoder.embed_positions.A.weight"]) - 3  # one of a class token, two unused
        hidden = len(tensors["beit3.encoder.layers.0.ffn.A.fc1.weight"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no checkpoint of BEiT-3 ({error}). The official ones have names such as "
            "beit3.encoder.layers.0.ffn.A.fc1.weight."
        ) from error
    depth = len({name.split(".")[3] for name in tensors if name.startswith("beit3.encoder.layers.")})
    model = timm.create_model(
        ARCHITECTURE,
        img_size=patch * round(patches**0.5),
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=max(1, width // HEAD_WIDTH),
        mlp_ratio=hidden / width,
        num_classes=num_classes,
    )
    copy_tower(model, checkpoint_filter_fn(tensors, model), path)
    return model


@torch.no_grad()
def copy_tower(model: nn.Module, given: dict[str, torch.Tensor], path: str) -> None:
    """Copy the vision tower; the head, and the norm before it where there is none, stay fresh."""
    for name, tensor in model.state_dict().items():
        found = given.get(name)
        if name.startswith("head.") or (found is None and name in FRESH):
            continue
        if found is None or found.shape != tensor.shape:
            what = "no such tensor" if found is None else f"the shape {list(found.shape)}"
            raise InputError(f"{path}: BEiT-3's {name} has the shape {list(tensor.shape)}, the file has {what}.")
        tensor.copy_(found)
