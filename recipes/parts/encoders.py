"""Encoders of texts with a head for a task: a Hub model, a local folder, or a small one pre-trained on the spot."""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from dtrain.errors import InputError
from parts.glue import GlueTask
from parts.masked import pretrain_on_english

ENGLISH = "english"

Inputs = dict[str, Tensor]


def load_encoder(pretrained: str, task: GlueTask, revision: str = "main") -> tuple[PreTrainedModel, Any]:
    """Return an encoder with a head for `task`, in training mode and float32, and its tokenizer.

    Args:
        pretrained: `english` (pre-trained here and cached), a local folder with config.json, model.safetensors and the
            files of a tokenizer, or the name of a Hub model, which is downloaded.
        task: Says what the head has to give. A head that the model has already stays, if it is of the same classes.
        revision: Commit, branch or tag of a Hub model.

    Raises:
        InputError: If there is no such model, it is no encoder, or head, tokenizer and model do not fit together.
    """
    if pretrained == ENGLISH:
        pretrained = str(pretrain_on_english())
    with quiet():
        try:
            config = AutoConfig.from_pretrained(pretrained, revision=revision)
            check_head(pretrained, config, task)
            config.num_labels = task.outputs
            model, found = AutoModelForSequenceClassification.from_pretrained(
                pretrained, config=config, revision=revision, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(pretrained, revision=revision)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{pretrained!r} at revision {revision!r} cannot be loaded as an encoder with its tokenizer, neither "
                f"as a local folder nor from the Hub ({str(error).strip().splitlines()[0]}). Give a local folder with "
                "--model.pretrained, or run without network: --preset offline."
            ) from error
    inside = f"{model.base_model_prefix}."  # the head is outside, and with it a pooler may be fresh
    needed = [name for name in found["missing_keys"] if name.startswith(inside) and ".pooler." not in name]
    check_complete(pretrained, needed, found["unexpected_keys"])
    check_tokenizer(pretrained, tokenizer, model)
    return model.train(), tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting a fresh head, which is meant, and from a bar for what takes a moment."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def check_head(pretrained: str, config: Any, task: GlueTask) -> None:
    """Raise an InputError if the model was fine-tuned to tell other classes, or in another order, than the task has."""
    if not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
        return
    names = [str(config.id2label[which]) for which in sorted(config.id2label)]
    nameless = not task.labels or all(re.fullmatch(r"LABEL_\d+", name) for name in names)
    same = len(names) == task.outputs if nameless else [*map(plain, names)] == [*map(plain, task.labels)]
    if not same:
        wanted = f"the classes {', '.join(task.labels)}, in this order" if task.labels else "one number"
        raise InputError(
            f"{pretrained!r} has a head of {len(names)} outputs, {names}, but {task.name!r} asks for {wanted}. Give a "
            "base without a head, or one of this task."
        )


def plain(label: str) -> str:
    """Return what is the same in all spellings of a label: `not_entailment`, `Not Entailment`."""
    return re.sub(r"[\W_]", "", label).casefold()


def check_complete(pretrained: str, missing: Iterable[str], unknown: Iterable[str]) -> None:
    """Raise an InputError if weights are not in the file: transformers begins with random ones instead."""
    lacks, has = (sorted(names) for names in (missing, unknown))
    if lacks:
        instead = f" It has {', '.join(has[:3])} instead." if has else ""
        raise InputError(
            f"{pretrained!r} lacks {len(lacks)} tensors of the model in its config.json, such as "
            f"{', '.join(lacks[:3])}.{instead} Save all weights by the names that transformers gives them."
        )


def check_tokenizer(pretrained: str, tokenizer: Any, model: PreTrainedModel) -> None:
    """Raise an InputError if the tokenizer can give tokens that the model does not have, or no padding."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer of {pretrained!r} knows {len(tokenizer):,} tokens, but the model has {rows:,}. Give the "
            "tokenizer that the model was pre-trained with."
        )
    if tokenizer.pad_token_id is None or (model.config.pad_token_id or 0) != tokenizer.pad_token_id:
        raise InputError(
            f"the tokenizer of {pretrained!r} pads with token {tokenizer.pad_token_id}, the model with "
            f"{model.config.pad_token_id}. Give the tokenizer that the model was pre-trained with."
        )


def longest(model: PreTrainedModel) -> int | None:
    """Return how many tokens the model has positions for; None where that is unlimited."""
    for name, part in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # The family of RoBERTa counts positions from behind its padding token.
            return part.num_embeddings - (0 if part.padding_idx is None else part.padding_idx + 1)
    return None


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Raise an InputError if texts would be longer than the model can read."""
    most = longest(model)
    if most is not None and not 3 <= max_length <= most:
        raise InputError(f"--model.max_length is {max_length}, but this model reads 3 to {most} tokens.")


def encode(tokenizer: Any, columns: Sequence[Sequence[str]], max_length: int, device: torch.device) -> Inputs:
    """Return a batch of texts, or of pairs, as what the model takes: cut, and padded to the longest of the batch.

    Token types are there only where the tokenizer gives them.
    """
    texts = [list(column) for column in columns]
    found = tokenizer(*texts, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {name: tensor.to(device) for name, tensor in found.items()}


def pooled(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    """Return the encoder's last hidden state as the first token's beside the mean of all: what a linear probe sees."""
    hidden = model.base_model(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1).to(hidden)
    return torch.cat([hidden[:, 0], (hidden * mask).sum(1) / mask.sum(1)], dim=1)
