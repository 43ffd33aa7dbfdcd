"""A small T5 that needs no network: pre-trained on the standard library's documentation.

Half of the batches are span corruption, as T5 has it. The other half are deshuffling, which the T5 paper compares to
it: words that moved a little are to be put in order again. Span corruption alone teaches an encoder nothing in two
minutes that a task on whole sentences could use: after 3,000 steps of it a linear probe on `word_order` was at 0.50,
and so was what had been fine-tuned for 1,000 steps; after 2,400 steps of both 0.56 and, fine-tuned for 600 steps, 0.69
(one run each).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Generator, Tensor, randperm
from transformers import T5Config, T5ForConditionalGeneration

from dtrain.progress import progress
from parts.corpus import to_pretrain
from parts.docstrings import docstrings

CACHE = Path("runs/cache/t5_english_base")
RATE, SPAN = 0.15, 3  # share of the tokens that is masked, and mean length of a span: those of the T5 paper
NEAR = 3  # a word moves by less than this many places
LENGTH, BATCH, STEPS = 32, 16, 2400  # tokens of a piece of text, pieces per step, steps
PEAK = 3e-2  # of the learning rate, relative to the size of a tensor
WORD = "▁"  # what a word's first token begins with
SENTINELS = 20
VOCABULARY = 600
SMALL = {
    "d_model": 64,
    "d_kv": 16,
    "num_heads": 4,
    "d_ff": 128,
    "num_layers": 2,
    "num_decoder_layers": 1,
    "dropout_rate": 0.0,  # it sees every text a few times only
    "relative_attention_max_distance": 64,
}


def corrupt(tokens: Sequence[int], sentinels: Sequence[int], generator: Generator) -> tuple[list[int], list[int]]:
    """Return the tokens with spans of them replaced by sentinels, and the spans, each behind its sentinel.

    As in the T5 paper: what was masked ends with one more sentinel. The first token is always kept, and no two spans
    touch.

    Args:
        tokens: At least two, without the end of the text.
        sentinels: Ids, one more than there are spans at least.
        generator: Says which spans.
    """
    masked = min(max(round(RATE * len(tokens)), 1), len(tokens) - 1)
    spans = min(max(round(masked / SPAN), 1), len(tokens) - masked, len(sentinels) - 1)
    rest, source, target = list(tokens), [], []
    lengths = zip(parts_of(len(tokens) - masked, spans, generator), parts_of(masked, spans, generator), strict=True)
    for sentinel, (keep, hide) in zip(sentinels, lengths, strict=False):
        source += [*rest[:keep], sentinel]
        target += [sentinel, *rest[keep : keep + hide]]
        rest = rest[keep + hide :]
    return source, [*target, sentinels[spans]]


def shuffle(words: Sequence[list[int]], generator: Generator) -> list[int]:
    """Return the tokens of words in another order, in which none is `NEAR` places or more from its own."""
    places = torch.arange(len(words)) + NEAR * torch.rand(len(words), generator=generator)
    return [token for place in places.argsort().tolist() for token in words[place]]


def parts_of(total: int, count: int, generator: Generator) -> list[int]:
    """Return `count` lengths of at least one that add up to `total`; all such lists are equally likely."""
    cuts = sorted((randperm(total - 1, generator=generator)[: count - 1] + 1).tolist())
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def train_tokenizer(sentences: Sequence[str]) -> Tokenizer:
    """Return a byte-pair tokenizer with the special tokens of T5, which ends every text with `</s>`."""
    unknown = "<unk>"
    special = ["<pad>", "</s>", unknown, *(f"<extra_id_{i}>" for i in range(SENTINELS))]
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(WORD)
    tokenizer.decoder = decoders.Metaspace(WORD)
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return tokenizer


def texts() -> list[str]:
    """Return what there is to pre-train on: documents, and the docstrings."""
    return [sentence for document in [*to_pretrain(), *docstrings()] for sentence in document]


def pieces(tokenizer: Tokenizer) -> Tensor:
    """Return the training texts as one, cut into pieces of `LENGTH` tokens."""
    encoded = tokenizer.encode_batch(texts(), add_special_tokens=False)
    tokens = torch.tensor([token for sentence in encoded for token in sentence.ids])
    return tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)


def to_words(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[list[int]]:
    """Return the tokens word by word; the first word may be the end of one."""
    words: list[list[int]] = [[]]
    for token in tokens:
        if tokenizer.id_to_token(token).startswith(WORD) and words[-1]:
            words.append([])
        words[-1].append(token)
    return words


def exercises(tokenizer: Tokenizer, steps: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches to pre-train on, of one kind and the other; pieces have one length, so there is no padding."""
    end, generator = tokenizer.token_to_id("</s>"), Generator().manual_seed(0)
    sentinels = [tokenizer.token_to_id(f"<extra_id_{i}>") for i in range(SENTINELS)]
    every = pieces(tokenizer)
    order = torch.cat([randperm(len(every), generator=generator) for _ in range(1 + steps * BATCH // len(every))])
    for step, chosen in enumerate(order[: steps * BATCH].view(steps, BATCH)):
        batch = every[chosen].tolist()
        if step % 2 == 0:
            pairs = [corrupt(piece, sentinels, generator) for piece in batch]
        else:
            pairs = [(shuffle(to_words(tokenizer, piece), generator), piece) for piece in batch]
        source, target = (torch.tensor([[*ids, end] for ids in side]) for side in zip(*pairs, strict=True))
        yield {"input_ids": source, "labels": target}


@torch.no_grad()
def look_at_neighbours(model: T5ForConditionalGeneration) -> None:
    """Let two heads of the encoder and one of the decoder begin at the token next to theirs.

    Large models find out by themselves. A minute is too short for that, and without it nothing but the frequencies of
    the tokens would be learnt.
    """
    encoder, decoder = (stack.block[0].layer[0].SelfAttention for stack in (model.encoder, model.decoder))
    after = encoder.relative_attention_num_buckets // 2 + 1  # the buckets of what follows are the second half
    encoder.relative_attention_bias.weight[1, 0] += 4.0
    encoder.relative_attention_bias.weight[after, 1] += 4.0
    decoder.relative_attention_bias.weight[1, 0] += 4.0


def pretrain_on_english(steps: int = STEPS) -> Path:
    """Train the small base, once, and return its folder: laid out as one of the Hub."""
    if CACHE.is_dir():
        return CACHE
    tokenizer = train_tokenizer(texts())
    config = T5Config(vocab_size=tokenizer.get_vocab_size(), decoder_start_token_id=0, **SMALL)
    with torch.random.fork_rng(devices=[]):  # whether the base was cached must not change the fine-tuning
        torch.manual_seed(0)
        model = T5ForConditionalGeneration(config).train()
        look_at_neighbours(model)
        # T5's own optimizer: its steps go with the size of a tensor, and the embedding is eight times the matrices.
        optimizer = torch.optim.Adafactor(model.parameters(), lr=PEAK)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, PEAK, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        with progress("pre-training the base by span corruption and deshuffling", steps) as advance:
            for batch in exercises(tokenizer, steps):
                loss = model(**batch).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                advance(f"loss {loss.item():.3f}")
    unfinished = CACHE.with_name(f"{CACHE.name}.unfinished")  # a run that is killed leaves no half of a base
    model.save_pretrained(unfinished)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    return unfinished.rename(CACHE)
