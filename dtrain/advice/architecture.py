"""Encoder or decoder: a guess from the names of tensors, since nothing else of the model is at hand."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Architecture = Literal["encoder", "decoder", "both", "unknown"]

# BERT and its kin, CLIP, timm's ViT, ...
_ENCODER = re.compile(r"(^|\.)(encoder\.(layers?|blocks?)\.|layer\.\d+\.|cls_token$|patch_embed|token_type_embeddings)")
# Llama and its kin, GPT-2, GPT-NeoX, OPT, T5's and BART's second half, ...
_DECODER = re.compile(
    r"(^|\.)(decoder\.(layers?|block)\.|h\.\d+\.|lm_head\.|(?<!encoder\.)layers\.\d+\.(self_attn|attention|attn|mlp)\.)"
)


def guess_architecture(names: Iterable[str]) -> Architecture:
    """Return what the tensor names look like.

    Args:
        names: Names of the fine-tuned model's tensors.

    Returns:
        "both" where some names are typical of one and some of the other, "unknown" where none is typical.
    """
    listed = list(names)
    found = (any(map(_ENCODER.search, listed)), any(map(_DECODER.search, listed)))
    guesses: dict[tuple[bool, bool], Architecture] = {
        (True, False): "encoder",
        (False, True): "decoder",
        (True, True): "both",
        (False, False): "unknown",
    }
    return guesses[found]
