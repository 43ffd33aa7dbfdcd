"""Text to text with T5: prompts, answers as text, and two ways to say which label a model means."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import pad_sequence
from transformers import T5ForConditionalGeneration

from dtrain.errors import InputError
from parts.encoders import check_complete, quiet
from parts.glue import GlueTask, task_metrics
from parts.spans import pretrain_on_english

ENGLISH = "english"

Arguments = tuple[Tensor, Tensor, Tensor, Tensor]

FILES = ["config.json", "generation_config.json", "model*.safetensors*", "tokenizer.json"]
NO_NUMBER = -1.0  # what an answer counts as that is no number, as in T5's own code
ROUNDED_UP = 128  # the vocabulary of a T5 is its tokenizer's, rounded up to a multiple of this at most


def find_folder(pretrained: str, revision: str = "main") -> Path:
    """Return the folder of a model and its tokenizer, in the layout of the Hub.

    Args:
        pretrained: `english` (pre-trained here and cached), a local folder, or the name of a Hub model, which is
            downloaded.
        revision: Commit, branch or tag of a Hub model.
    """
    if pretrained == ENGLISH:
        return pretrain_on_english()
    if Path(pretrained).is_dir():
        return Path(pretrained)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(pretrained, revision=revision, allow_patterns=FILES))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{pretrained!r} at revision {revision!r} is no local folder and cannot be downloaded from the Hub "
            f"({str(error).splitlines()[0]}). Give a local folder with --model.pretrained, or run without network: "
            "--preset offline."
        ) from error


def load_t5(folder: Path) -> tuple[T5ForConditionalGeneration, Tokenizer]:
    """Return a T5 and its tokenizer, which must be made for each other.

    Embedding and output layer are one tensor, as in T5, or two, as in T5 v1.1: that is up to the file.
    """
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("t5", "mt5"):
        raise InputError(f"{folder} holds a model of type {kind!r}, not a T5. Give one with --model.pretrained.")
    try:
        with quiet():
            model, found = T5ForConditionalGeneration.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be read as a T5 ({str(error).splitlines()[0]}).") from error
    check_complete(str(folder), found["missing_keys"], found["unexpected_keys"])
    model.config.use_cache = False  # nothing is decoded step by step but by `generate`, which has its own setting
    return model.train(), load_tokenizer(folder, model)


def load_tokenizer(folder: Path, model: T5ForConditionalGeneration) -> Tokenizer:
    """Return the fast tokenizer of a folder, checked against the model."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"{folder} has no tokenizer.json. Save the model's fast tokenizer there.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # that is what tokenizers raises
        raise InputError(f"{path} cannot be read as a tokenizer ({error}).") from error
    size, rows = tokenizer.get_vocab_size(), model.config.vocab_size
    if not 0 <= rows - size < ROUNDED_UP:
        raise InputError(
            f"{path} knows {size} tokens, but the model has {rows}. Give the tokenizer that it was pre-trained with."
        )
    end = model.config.eos_token_id
    if tokenizer.encode("a").ids[-1:] != [end]:
        raise InputError(f"{path} does not end a text with token {end}, as the model does. Give a T5's tokenizer.")
    tokenizer.enable_padding(
        pad_id=model.config.pad_token_id, pad_token=tokenizer.id_to_token(model.config.pad_token_id)
    )
    return tokenizer


def read_json(path: Path) -> dict:
    """Return what a JSON file holds."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}). Give a folder in the layout of the Hub.") from error


def prompt(task: GlueTask, row: Sequence[str]) -> str:
    """Return a row of a task as the text that T5 gets: `mnli hypothesis: ... premise: ...`.

    The columns stand in alphabetical order, which is that of the examples in appendix D of the T5 paper.
    """
    return " ".join([task.name, *(f"{name}: {text}" for name, text in sorted(zip(task.columns, row, strict=True)))])


def label_texts(task: GlueTask) -> list[str]:
    """Return what may be answered: the names of the classes, or the numbers of STS-B in steps of 0.2."""
    return list(task.labels) or [f"{step / 5:.1f}" for step in range(26)]


def label_ids(task: GlueTask, labels: Tensor) -> Tensor:
    """Return which of `label_texts` is right: class ids as they are, numbers rounded to 0.2."""
    return labels if task.labels else (labels * 5).round().long().clamp(0, 25)


def encode(tokenizer: Tokenizer, texts: Sequence[str], longest: int, device: torch.device) -> dict[str, Tensor]:
    """Return the ids of texts, cut to `longest` tokens and padded to one length, with the mask of what is text."""
    tokenizer.enable_truncation(longest)
    found = tokenizer.encode_batch(list(texts))
    ids, mask = ([getattr(text, name) for text in found] for name in ("ids", "attention_mask"))
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}


class Labels(NamedTuple):
    """The texts of all labels one after the other, to be scored in one go.

    Args:
        texts: The texts.
        ids: Tokens of all of them, each text with its end.
        owner: Whose token each is.
    """

    texts: list[str]
    ids: Tensor
    owner: Tensor

    def target(self, which: Tensor, ignore: int = -100) -> Tensor:
        """Return the tokens of the given labels, filled up with `ignore`."""
        rows = [self.ids[self.owner == label] for label in which.tolist()]
        return pad_sequence(rows, batch_first=True, padding_value=ignore)

    @property
    def longest(self) -> int:
        """Tokens of the longest label."""
        return int(self.owner.bincount().max())


def encode_labels(tokenizer: Tokenizer, texts: Sequence[str]) -> Labels:
    """Return the labels of a task as tokens.

    Raises:
        InputError: If two of them are the same to the tokenizer.
    """
    ids = [tokenizer.encode(text).ids for text in texts]
    if len({*map(tuple, ids)}) < len(texts):
        raise InputError(
            f"two of the labels {list(texts)} are the same to the tokenizer. Give the model's own tokenizer."
        )
    owner = [which for which, tokens in enumerate(ids) for _ in tokens]
    return Labels(list(texts), torch.tensor([token for tokens in ids for token in tokens]), torch.tensor(owner))


def forward_arguments(model: T5ForConditionalGeneration, inputs: dict[str, Tensor], labels: Labels) -> Arguments:
    """Return what one call of the model takes to score all labels: ids, mask, decoder ids, decoder mask.

    The decoder gets the labels as one sequence, in which no token sees those of another label. That is each by itself:
    T5 knows positions by their distance only. By position and not by keyword: for an objective of dtrain, a keyword
    `attention_mask` would say which rows of the answer are padding.
    """
    ids, owner = (part.to(inputs["input_ids"].device) for part in (labels.ids, labels.owner))
    begins = torch.cat([owner.new_ones(1, dtype=torch.bool), owner[1:] != owner[:-1]])
    before = torch.where(begins, model.config.decoder_start_token_id, ids.roll(1))
    sees = (owner[:, None] == owner) & (owner.new_ones(len(ids), len(ids)).tril() > 0)
    count = len(inputs["input_ids"])
    return inputs["input_ids"], inputs["attention_mask"], before.expand(count, -1), sees.expand(count, 1, -1, -1)


def log_likelihoods(model: T5ForConditionalGeneration, inputs: dict[str, Tensor], labels: Labels) -> Tensor:
    """Return the log-likelihood of the text of every label, (inputs, labels), in one call of the model."""
    logits = model(*forward_arguments(model, inputs, labels)).logits.float()
    ids, owner = (part.to(logits.device) for part in (labels.ids, labels.owner))
    found = logits.log_softmax(-1).gather(-1, ids.expand(len(logits), -1).unsqueeze(-1)).squeeze(-1)
    return found @ one_hot(owner).to(found)


def choose(task: GlueTask, scores: Tensor) -> Tensor:
    """Return the label of the greatest score, as the metrics take it: a class id, or a number."""
    best = scores.argmax(-1)
    return best if task.labels else best / 5


@torch.no_grad()
def generate(
    model: T5ForConditionalGeneration, tokenizer: Tokenizer, inputs: dict[str, Tensor], longest: int
) -> list[str]:
    """Return what the model answers, greedily, with `longest` tokens at most."""
    answers = model.generate(**inputs, max_new_tokens=longest, do_sample=False, num_beams=1)
    return [text.strip() for text in tokenizer.decode_batch(answers.tolist(), skip_special_tokens=True)]


def read_answers(task: GlueTask, texts: Sequence[str], truth: Tensor) -> Tensor:
    """Return what generated texts say, as the metrics take it.

    A text that is no label counts as wrong, whatever is right; one that is no number as -1.
    """
    if not task.labels:
        return torch.tensor([to_number(text) for text in texts], device=truth.device)
    known = {text: label for label, text in enumerate(task.labels)}
    found = torch.tensor([known.get(text, -1) for text in texts], device=truth.device)
    return torch.where(found < 0, (truth + 1) % len(task.labels), found)


def to_number(text: str) -> float:
    """Return the number that a text is, or `NO_NUMBER`."""
    try:
        value = float(text)
    except ValueError:
        return NO_NUMBER
    return value if abs(value) < float("inf") else NO_NUMBER


def score(task: GlueTask, answers: Tensor, truth: Tensor) -> float:
    """Return the monitored metric of a task."""
    metrics = task_metrics(task)
    metrics.update(answers, truth)
    return float(metrics.compute()[task.metrics[0]])


@torch.no_grad()
def mean_states(model: T5ForConditionalGeneration, inputs: dict[str, Tensor]) -> Tensor:
    """Return the mean of the encoder's last hidden states over the tokens of each input."""
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (model.encoder(**inputs).last_hidden_state * mask).sum(1).cpu() / mask.sum(1).cpu()
