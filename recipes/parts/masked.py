"""A small RoBERTa that needs no network: pre-trained by masked words on the standard library's documentation."""

import json
import math
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save
from tokenizers import ByteLevelBPETokenizer
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizer

from dtrain.artifact.atomic import write_atomic
from dtrain.progress import progress
from parts.corpus import to_pretrain

CACHE = Path("runs/cache/roberta_english_base")
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # in RoBERTa's order, but for the last
START, PAD, END, MASK = 0, 1, 2, 4
VOCABULARY = 600
SMALL = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "max_position_embeddings": 130,  # RoBERTa counts from behind the padding token: 128 tokens
    "type_vocab_size": 1,
    "hidden_dropout_prob": 0.0,  # it sees every text a few times only
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,  # 1 / sqrt(hidden_size), as 0.02 is for the hidden sizes of real ones
}
RATE = 0.25  # share of the tokens that are guessed
#: Steps, tokens of a window, windows of a batch, and the last position that a window may begin at. A small model finds
#: out that neighbours matter only where there are few others, and then goes on to more of them.
STAGES = ((700, 12, 64, 0), (400, 12, 64, 80), (900, 48, 16, 80))
LR = 3e-3


class Masked(NamedTuple):
    """A batch of windows with some tokens hidden.

    Args:
        tokens: What the model sees.
        positions: Of these tokens; windows begin anywhere, so that every position is learnt.
        hidden: Which tokens are to be guessed.
        truth: What they are.
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    truth: Tensor


def train_tokenizer(sentences: Sequence[str]) -> RobertaTokenizer:
    """Return a byte-level byte-pair tokenizer with the special tokens of RoBERTa."""
    made = ByteLevelBPETokenizer(add_prefix_space=True)
    made.train_from_iterator(sentences, VOCABULARY, special_tokens=SPECIAL, show_progress=False)
    model = json.loads(made.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return RobertaTokenizer(vocab=model["vocab"], merges=merges, add_prefix_space=True)


def windows(tokens: Tensor, stage: tuple[int, int, int, int], generator: Generator) -> Iterator[Masked]:
    """Yield batches for the steps of a stage: as in BERT, a tenth of what is guessed stays and a tenth is swapped."""
    steps, length, count, furthest = stage
    for _ in range(steps):
        begin = torch.randint(len(tokens) - length, (count, 1), generator=generator)
        truth = tokens[begin + torch.arange(length)]
        shift = torch.randint(furthest + 1, (count, 1), generator=generator)
        hidden = (torch.rand(truth.shape, generator=generator) < RATE) & (truth > MASK)
        lot = torch.rand(truth.shape, generator=generator)
        seen = truth.masked_fill(hidden & (lot < 0.8), MASK)
        other = torch.randint(MASK + 1, VOCABULARY, truth.shape, generator=generator)
        seen = torch.where(hidden & (lot > 0.9), other, seen)
        yield Masked(seen, PAD + 1 + shift + torch.arange(length), hidden, truth[hidden])


def loss_of(model: RobertaForMaskedLM, batch: Masked) -> Tensor:
    states = model.roberta(batch.tokens, position_ids=batch.positions).last_hidden_state
    return cross_entropy(model.lm_head(states[batch.hidden]), batch.truth)


@torch.no_grad()
def place_waves(table: nn.Embedding, longest: float = 30.0) -> None:
    """Begin with positions as sine and cosine waves: neighbours are then alike in the same way wherever they are."""
    count, size = table.weight.shape
    rates = torch.exp(torch.arange(0, size, 2) / size * -math.log(longest))
    angles = torch.arange(count).unsqueeze(1) * rates
    table.weight.copy_(
        torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) * 2**0.5 * SMALL["initializer_range"]
    )


def pretrain_on_english(stages: Sequence[tuple[int, int, int, int]] = STAGES) -> Path:
    """Train the small base, once, and return its folder: laid out as one of the Hub."""
    if (CACHE / "model.safetensors").exists():
        return CACHE
    documents = to_pretrain()
    tokenizer = train_tokenizer([sentence for document in documents for sentence in document])
    tokens = torch.tensor([token for document in documents for token in tokenizer(" ".join(document))["input_ids"]])
    with torch.random.fork_rng(devices=[]):  # whether the base was cached must not change the fine-tuning
        torch.manual_seed(0)
        model = RobertaForMaskedLM(RobertaConfig(vocab_size=VOCABULARY, **SMALL)).train()
        place_waves(model.roberta.embeddings.position_embeddings)
        train(model, tokens, stages)
    CACHE.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(CACHE)
    # Without the head that guesses: the file is the base of what is fine-tuned, by the same names.
    weights = {f"roberta.{name}": tensor for name, tensor in model.roberta.state_dict().items()}
    model.config.save_pretrained(CACHE)
    write_atomic(CACHE / "model.safetensors", [save(weights)])  # last: its presence says that the folder is whole
    return CACHE


def train(model: RobertaForMaskedLM, tokens: Tensor, stages: Sequence[tuple[int, int, int, int]]) -> None:
    """Pre-train in stages with one cycle of the learning rate."""
    steps, generator = sum(stage[0] for stage in stages), Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.1)
    with progress("pre-training the base by masked words", steps) as advance:
        for batch in chain.from_iterable(windows(tokens, stage, generator) for stage in stages):
            loss = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(f"loss {loss.item():.3f}")
