"""Which tensor is treated how: rules on names, shapes and dtypes only, so that every door writes the same file."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, cast

import torch

from dtrain.errors import InputError

Role = Literal["method", "half", "bits", "whole", "drop"]

#: Usual names of task heads. A head is fresh in almost every fine-tune, so it is stored whole: a delta to one random
#: initialisation could not be put on another. A pre-trained `lm_head` is not in this list.
HEADS = tuple(
    pattern
    for name in ("head", "heads", "head_dist", "classifier", "classification_head", "score", "qa_outputs")
    for pattern in (f"{name}.*", f"*.{name}.*")
) + ("fc.*",)


@dataclass(frozen=True)
class Rules:
    """Assign every tensor a role by its name, shape and dtype.

    Patterns are shell-style (`*`, `?`, `[ab]`) and match the whole tensor name, case-sensitively. The first rule that
    applies decides: `drop`, `whole`, not floating point -> bitwise, `include` minus `exclude` and at least two
    dimensions longer than one -> the method, everything else (norms, biases, single tokens) -> its full delta in half
    precision.

    Args:
        include: Tensors that the method may compress.
        exclude: Tensors that the method must leave alone; their delta is kept in half precision instead.
        whole: Tensors that are fresh in the fine-tuned model, stored as they are and no part of the base's fingerprint.
        drop: Tensors that stay at the base: their delta is thrown away.

    Raises:
        InputError: If a single string is given where a sequence of patterns is expected.
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    whole: Sequence[str] = HEADS
    drop: Sequence[str] = ()

    def __post_init__(self) -> None:
        for field in ("include", "exclude", "whole", "drop"):
            patterns = getattr(self, field)
            if isinstance(patterns, str):
                raise InputError(
                    f"`{field}` must be a list of patterns, got the string {patterns!r}. Use [{patterns!r}]."
                )
            object.__setattr__(self, field, tuple(patterns))

    def role(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Role:
        """Return what becomes of the tensor called `name`."""
        if matches(name, self.drop):
            return "drop"
        if matches(name, self.whole):
            return "whole"
        if not dtype.is_floating_point or dtype.itemsize == 1:  # a float8 has too few bits to add half a delta to
            return "bits"
        is_matrix = sum(size > 1 for size in shape) >= 2
        if is_matrix and matches(name, self.include) and not matches(name, self.exclude):
            return "method"
        return "half"

    def check(self, names: Collection[str]) -> None:
        """Refuse a pattern, other than a default one, that matches none of `names`: it is likely misspelt.

        Raises:
            InputError: If there is one.
        """
        default = Rules()
        for field in ("include", "exclude", "whole", "drop"):
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
