"""What torchscale computes with weights made by a formula, and how the recorded numbers were made.

    python -m tests.recipes.torchscale_golden        # fetches torchscale, without what it pins, and records anew

torchscale hosts the transformer of the original BEiT-3. It pins old releases of timm and fairscale, so it cannot be a
dependency; of fairscale it needs two functions that do nothing here.
"""

import subprocess
import sys
import tempfile
import types
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).with_name("torchscale_golden.safetensors")
TORCHSCALE = "torchscale==0.3.0"
SIZES = {"width": 32, "depth": 2, "heads": 4, "image_size": 8, "patch_size": 2, "vocabulary": 40, "positions": 20}


def values(name, shape, scale=1.0):
    """Return a tensor that follows from its name, alike on every machine: sines of quadratic phases."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000 + index * 0.7 + (index % 997) ** 2 * 0.013
    return (scale * torch.sin(phase)).float().reshape(shape)


def weights(shapes):
    """Return weights for the names and shapes of a state dict; those of norms lie around one."""
    return {
        name: values(name, shape, 0.4) + float(len(shape) == 1 and name.endswith("weight"))
        for name, shape in shapes.items()
    }


def inputs():
    """Return images, tokens, their padding, and hidden patches."""
    padding = torch.arange(7) >= torch.tensor([7, 4, 5])[:, None]
    tokens = (torch.arange(21).reshape(3, 7) * 11 + 5) % SIZES["vocabulary"]
    return values("images", (3, 3, 8, 8)), tokens, padding, values("masked", (3, 16)) > 0.5


def calls():
    """Return the arguments of every recorded call, by its name; the names of the arguments are ours."""
    images, tokens, padding, masked = inputs()
    return {
        "images": {"images": images},
        "masked": {"images": images, "masked": masked},
        "text": {"tokens": tokens, "padding": padding},
        "fused": {"images": images, "tokens": tokens, "padding": padding},
        "unpadded": {"images": images, "tokens": tokens},
    }


THEIRS = {
    "images": "visual_tokens",
    "masked": "vision_masked_position",
    "tokens": "textual_tokens",
    "padding": "text_padding_position",
}


def original():
    """Return torchscale's BEiT-3 with the weights of the formula; torchscale has to be importable."""
    fairscale = types.ModuleType("fairscale.nn")
    fairscale.checkpoint_wrapper = fairscale.wrap = lambda module, *_, **__: module
    sys.modules.update({"fairscale": types.ModuleType("fairscale"), "fairscale.nn": fairscale})
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    config = EncoderConfig(
        img_size=SIZES["image_size"],
        patch_size=SIZES["patch_size"],
        vocab_size=SIZES["vocabulary"],
        max_source_positions=SIZES["positions"],
        encoder_embed_dim=SIZES["width"],
        encoder_ffn_embed_dim=4 * SIZES["width"],
        encoder_attention_heads=SIZES["heads"],
        encoder_layers=SIZES["depth"],
        multiway=True,
        normalize_output=True,
        no_output_layer=True,
    )
    model = BEiT3(config).eval()
    model.load_state_dict(weights({name: tensor.shape for name, tensor in model.state_dict().items()}))
    return model


@torch.no_grad()
def record():
    """Fetch torchscale, run it and write what it computes."""
    with tempfile.TemporaryDirectory() as folder:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, TORCHSCALE]
        subprocess.run(install, check=True)
        sys.path.insert(0, folder)
        model = original()
        found = {
            name: model(**{THEIRS[key]: value for key, value in arguments.items()})["encoder_out"].contiguous()
            for name, arguments in calls().items()
        }
    save_file(found, GOLDEN, {"from": TORCHSCALE})


if __name__ == "__main__":
    record()
