"""A Hugging Face folder of a text model as a module that can be run: from local files, with nobody else's code."""

from __future__ import annotations

import inspect
import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from dtrain.cli.renamed import named_as_delta
from dtrain.errors import InputError
from dtrain.weights import read_weights

_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "spiece.model", "tokenizer.model")
_LONGEST = 512  # tokens of a text: what is beyond is cut off
_IN_PYTHON = (
    "In Python any model can be calibrated: dtrain.compress(..., objective=dtrain.HiddenChange(model, batches), "
    "calibration=dtrain.Calibration(model, batches))."
)


class TextModel(NamedTuple):
    """A fine-tuned model that can be run.

    Args:
        module: Its tensors have the names that a delta to the base gives them.
        batches: Padded batches of tokens.
        writes: Whether it generates text, as a decoder does.
    """

    module: nn.Module
    batches: list[dict[str, Tensor]]
    writes: bool


def load_text_model(
    base: str, finetuned: str, rows: Sequence[tuple[str, ...]], batch: int, device: str = "cpu"
) -> TextModel:
    """Load a fine-tuned model, and cut `rows` into batches of its tokens.

    Where an encoder writes into a decoder, the decoder is given its start token alone.

    Args:
        base: The model before fine-tuning, as `read_weights` takes it. Its folder lends its tokenizer to one without.
        finetuned: A Hugging Face folder.
        rows: Texts, or pairs of texts.
        batch: Rows in a batch.
        device: Where the model is to run.

    Raises:
        InputError: If the folder is no text model that transformers can build from it, or lacks what it needs.
    """
    config = _config(finetuned)
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "to run a model takes transformers, which is missing. Try: pip install 'dtrain[text]'"
        ) from error
    with _quiet(transformers):
        model = _model(transformers, finetuned, config)
        tokenizer = _tokenizer(transformers, (finetuned, base))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise InputError(f"the tokenizer of {finetuned} has neither a padding token nor an end token. Give it one.")
    if model.config.pad_token_id is None:  # a classifier on a decoder looks for the last token before it
        model.config.pad_token_id = tokenizer.pad_token_id
    batches = [_tokens(model, tokenizer, rows[start : start + batch]) for start in range(0, len(rows), batch)]
    module = named_as_delta(model, read_weights(base), read_weights(finetuned))
    return TextModel(_on(device, module), batches, bool(model.can_generate()))


def _config(finetuned: str) -> dict[str, Any]:
    path = Path(finetuned) / "config.json"
    if not path.is_file():
        raise InputError(
            f"{finetuned} is no Hugging Face folder with a config.json, from which a model could be built and run. "
            f"Save the model with save_pretrained(), and its tokenizer beside it. {_IN_PYTHON}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}). Download the folder again.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path} names no model_type: it is not of transformers. {_IN_PYTHON}")
    return cast("dict[str, Any]", config)


def _model(transformers: Any, folder: str, config: dict[str, Any]) -> Any:
    """Build the class that the config names, or the bare model where it names none."""
    name = next(iter(config.get("architectures") or ()), "AutoModel")
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, (transformers.PreTrainedModel, transformers.AutoModel))):
        raise InputError(
            f"{folder} is a {name}, which transformers {transformers.__version__} does not have; code that comes with "
            f"a model is never run here. {_IN_PYTHON}"
        )
    arguments = {"local_files_only": True, "use_safetensors": True, "dtype": "auto", "output_loading_info": True}
    if kind is transformers.AutoModel:
        arguments["trust_remote_code"] = False
    try:
        model, found = cast("Any", kind).from_pretrained(folder, **arguments)
    except Exception as error:  # from files, which make it raise whatever they like
        raise InputError(f"transformers cannot build {name} from {folder}: {_first_line(error)}") from error
    if model.main_input_name != "input_ids":
        raise InputError(f"{folder} is no text model: {name} takes {model.main_input_name}. {_IN_PYTHON}")
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{folder} lacks {missing[0]!r} ({len(missing)} tensors of {name} are missing): it would be run with "
            "random weights. Save the whole model."
        )
    model.config.use_cache = False  # nothing is generated: the keys and values would be memory for nothing
    return model.requires_grad_(False)


def _tokenizer(transformers: Any, folders: Sequence[str]) -> Any:
    """Load the tokenizer of the first folder that has one."""
    for folder in folders:
        if not any((Path(folder) / name).is_file() for name in _TOKENIZERS):
            continue
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # likewise
            raise InputError(f"transformers cannot build the tokenizer of {folder}: {_first_line(error)}") from error
    raise InputError(
        f"there is no tokenizer in {' or '.join(folders)}, so that texts cannot be read. Save it beside the model: "
        f"tokenizer.save_pretrained({folders[0]!r})."
    )


def _tokens(model: Any, tokenizer: Any, rows: Sequence[tuple[str, ...]]) -> dict[str, Tensor]:
    """Return one batch: padded on the right, so that every token has its own position, whatever is beside it."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    encoded = tokenizer(
        *columns,
        padding=True,
        padding_side="right",
        truncation=True,
        max_length=_longest(model, tokenizer),
        return_tensors="pt",
    )
    taken = inspect.signature(model.forward).parameters
    batch = {name: value for name, value in encoded.items() if name in taken}
    known = model.get_input_embeddings().num_embeddings
    if int(batch["input_ids"].max()) >= known:
        raise InputError(f"the tokenizer knows more than the {known} tokens of the model: it is of another model.")
    if model.config.is_encoder_decoder and (model.can_generate() or model.base_model is model):
        start = model.config.decoder_start_token_id
        start = model.config.pad_token_id if start is None else start
        batch["decoder_input_ids"] = torch.full((len(rows), 1), start)
    return batch


def _longest(model: Any, tokenizer: Any) -> int:
    """Return how many tokens the model can take, or the limit."""
    positions = getattr(model.config, "max_position_embeddings", None) or _LONGEST
    for layer in model.modules():  # RoBERTa counts positions from behind its padding token
        if isinstance(layer, nn.Embedding) and layer.num_embeddings == positions and layer.padding_idx is not None:
            positions -= layer.padding_idx + 1
            break
    return min(_LONGEST, positions, tokenizer.model_max_length)


def _on(device: str, module: nn.Module) -> nn.Module:
    try:
        return module.to(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise InputError(f"the model cannot be put on {device!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """Keep what transformers says while it loads out of a command's output: what matters is checked."""
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity(logs.CRITICAL)
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
