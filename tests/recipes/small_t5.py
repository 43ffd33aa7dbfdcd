"""A small random T5 with its tokenizer, in the layout of the Hub, and sentences for it."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from parts import spans

WORDS = ["the", "a", "film", "plot", "was", "is", "very", "dull", "bright", "one", "two", "three", "good", "bad"]
OLD_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # T5's first files have it


def sentences(count: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size=generator.integers(3, 10))) for _ in range(count)]


def save_t5(folder: Path, *, tied: bool) -> None:
    """Write a random T5 (or a T5 v1.1, whose output layer is a tensor of its own) in the layout of the Hub."""
    torch.manual_seed(0)
    tokenizer = spans.train_tokenizer([*sentences(300, 0), "sst2 stsb sentence: positive negative 0.2 3.4 5.6 7.8 9.1"])
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        decoder_start_token_id=0,
        feed_forward_proj="relu" if tied else "gated-gelu",
        tie_word_embeddings=tied,
    )
    model = T5ForConditionalGeneration(config)
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) / 6)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    if tied:
        weights = load_file(folder / "model.safetensors")
        save_file({**weights, OLD_BIAS: torch.randn(32, 4)}, folder / "model.safetensors", {"format": "pt"})
