"""Which tensor is treated how: rules on names, shapes and dtypes only, so that every door writes the same file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch

from dtrain.errors import InputError

Role = Literal["method", "vector", "half", "bits", "whole", "embedding", "drop"]
#: How norms and biases are stored, and fresh matrices.
VectorCode = Literal["auto", "sign", "uniform4", "uniform8", "float16"]
FreshCode = Literal["uniform8", "uniform4", "float16", "exact"]
_CODES = {"vectors": get_args(VectorCode), "fresh": get_args(FreshCode)}

#: Usual names of task heads. A head is fresh in almost every fine-tune, so it is stored whole: a delta to one random
#: initialisation could not be put on another. A pre-trained `lm_head` is not in this list.
HEADS = tuple(
    pattern
    for name in ("head", "heads", "head_dist", "classifier", "classification_head", "score", "qa_outputs")
    for pattern in (f"{name}.*", f"*.{name}.*")
) + ("fc.*",)

#: Names of the token embeddings of encoders (BERT and its kin), half of a small one's elements. Those of decoders
#: (`embed_tokens`, `wte`, `shared`) are not in this list: they are often the output layer as well. Those of a masked
#: language model with a tied head are that too, which a file does not show: give `embeddings=()` for one.
EMBEDDINGS = ("word_embeddings.weight", "*.word_embeddings.weight")


#: The fields of `Rules` that are lists of patterns.
PATTERNS = ("include", "exclude", "whole", "drop", "embeddings")


@dataclass(frozen=True)
class Rules:
    """Assign every tensor a role by its name, shape and dtype.

    Patterns are shell-style (`*`, `?`, `[ab]`) and match the whole tensor name, case-sensitively. The first rule that
    applies decides:

    1. `drop`: the tensor stays at the base.
    2. `whole`, or the base has no tensor of this name, shape and sort of dtype: it is stored without the base. A matrix
       is coded by `fresh`, anything else as it is.
    3. Not floating point, or of one byte: bit for bit.
    4. `embeddings`: the tensor stays at the base, unless the method is bitwise.
    5. `include` minus `exclude`, and at least two dimensions longer than one: the method.
    6. A `weight` or `bias` of at most one dimension longer than one (norms, biases): its delta, coded by `vectors`.
    7. Everything else (single tokens, running statistics, excluded matrices): its delta in half precision.

    The defaults are for small files. Measured on MiniLM fine-tuned on SST-2 with two seeds (`bench/small_files.py`), as
    the change of the last hidden state on 256 training sentences, in units of the base's: `SeededSign(keep=1/32)` by
    the default rules makes a file of 50 KB and a change of 0.598. Half precision for norms and biases: 108 KB, 0.588;
    norms and biases at the base: 45 KB, 0.618; embeddings by the method: 96 KB, 0.597, where the default rules at twice
    the keep rate take 92 KB, 0.584; head exact: 52 KB, with the same scores. That is evidence for classifiers of
    sentences, not for a new language, a domain of new words, or tokens trained from scratch: give `embeddings=()`
    there. A report names what was left at the base.

    Args:
        include: Tensors that the method may compress.
        exclude: Tensors that the method must leave alone; the delta of a matrix is kept in half precision instead.
        whole: Tensors that are fresh in the fine-tuned model, stored without the base and no part of its fingerprint.
        drop: Tensors that stay at the base: their delta is thrown away. One that does not fit the base is left out.
        embeddings: Token embeddings, which stay at the base as well; but where the base has none of their shape (a
            vocabulary that grew) they are stored whole. No pattern: the method compresses them.
        vectors: How the deltas of norms and biases are stored: "sign" is one bit a value and one scale a tensor;
            "uniform4" and "uniform8" are 4 and 8 bits and a step; "float16" is half precision; "auto" is "sign", but
            "uniform4" for a dtype of 16 bits.
        fresh: How matrices that the base does not have are stored: "uniform8" and "uniform4" are 8 and 4 bits a value
            and a step per row; "float16" is half precision; "exact" is bit for bit.

    Raises:
        InputError: If a single string is given where a sequence of patterns is expected, or a code is unknown.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    whole: Sequence[str] = HEADS
    drop: Sequence[str] = ()
    embeddings: Sequence[str] = EMBEDDINGS
    vectors: VectorCode = "auto"
    fresh: FreshCode = "uniform8"

    def __post_init__(self) -> None:
        for field in PATTERNS:
            patterns = getattr(self, field)
            if isinstance(patterns, str):
                raise InputError(
                    f"`{field}` must be a list of patterns, got the string {patterns!r}. Use [{patterns!r}]."
                )
            object.__setattr__(self, field, tuple(patterns))
        for field, codes in _CODES.items():
            if getattr(self, field) not in codes:
                raise InputError(f"`{field}` must be one of {', '.join(codes)}, got {getattr(self, field)!r}.")

    def role(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Role:
        """Return what becomes of the tensor called `name`."""
        if matches(name, self.drop):
            return "drop"
        if matches(name, self.whole):
            return "whole"
        if not dtype.is_floating_point or dtype.itemsize == 1:  # a float8 has too few bits to add half a delta to
            return "bits"
        if matches(name, self.embeddings):
            return "embedding"
        if is_matrix(shape):
            return "method" if matches(name, self.include) and not matches(name, self.exclude) else "half"
        return "vector" if is_weight_or_bias(name) else "half"

    def check(self, names: Collection[str]) -> None:
        """Refuse a pattern, other than a default one, that matches none of `names`: it is likely misspelt.

        Raises:
            InputError: If there is one.
        """
        default = Rules()
        for field in PATTERNS:
            given = cast("Sequence[str]", getattr(self, field))
            for pattern in given if given != getattr(default, field) else ():
                if not any(matches(name, [pattern]) for name in names):
                    raise InputError(
                        f"`{field}` has the pattern {pattern!r}, which matches no tensor "
                        f"({next(iter(names), None)!r} is one). Patterns match whole names: write '*' for any text."
                    )


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether `name` matches at least one of the shell-style `patterns`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_weight_or_bias(name: str) -> bool:
    """Return whether `name` is that of a module's weight or bias."""
    return name.rpartition(".")[2] in ("weight", "bias")


def is_matrix(shape: Sequence[int]) -> bool:
    """Return whether at least two dimensions are longer than one."""
    return sum(size > 1 for size in shape) >= 2
