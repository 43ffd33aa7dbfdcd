"""Adapters and the models they are of: written by hand, or made by PEFT."""

import copy
import json

import torch
from safetensors.torch import save_file
from torch import nn

PREFIX = "base_model.model."
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["up", "down"], "bias": "none"}
SCALING = CONFIG["lora_alpha"] / CONFIG["r"]


def base():
    return {
        "enc.up.weight": torch.randn(6, 4), "enc.up.bias": torch.randn(6), "enc.down.weight": torch.randn(4, 6),
        "enc.norm.weight": torch.randn(4),
    }  # fmt: skip


def factors(rank=2):
    """Return an adapter of `base()` under PEFT's names."""
    state = {"enc.up.lora_A.weight": (rank, 4), "enc.up.lora_B.weight": (6, rank)}
    state |= {"enc.down.lora_A.weight": (rank, 6), "enc.down.lora_B.weight": (4, rank)}
    return {PREFIX + name: torch.randn(shape) for name, shape in state.items()}


def product(state, module):
    """Return scaling * B A, straight from the definition."""
    return SCALING * state[f"{PREFIX}{module}.lora_B.weight"] @ state[f"{PREFIX}{module}.lora_A.weight"]


def write(folder, state=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file(factors() if state is None else state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


class Net(nn.Module):
    """Every sort of layer that LoRA goes on: an embedding, linear layers, a square one, and two convolutions."""

    def __init__(self, middle=None):
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.square = nn.Linear(12, 12)
        self.middle = middle or nn.Identity()
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.line = nn.Conv1d(4, 6, 1)
        self.norm = nn.LayerNorm(6)
        self.classifier = nn.Linear(6, 3)

    def forward(self, ids):
        hidden = self.middle(self.square(self.up(self.tokens(ids)).tanh()))
        hidden = self.line(self.image(hidden[:, None]).flatten(2)).transpose(1, 2)
        return self.classifier(self.norm(hidden).mean(1))


class Tied(nn.Module):
    """An output layer that shares the weight of the embedding."""

    def __init__(self):
        super().__init__()
        self.tokens, self.logits = nn.Embedding(11, 8), nn.Linear(8, 11)
        self.logits.weight = self.tokens.weight

    def forward(self, ids):
        return self.logits(self.tokens(ids))


def trained(model, folder, **options):
    """Put a LoRA on a copy of `model`, change all that it trains, save it, and return the PEFT model."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return adapted.eval()
