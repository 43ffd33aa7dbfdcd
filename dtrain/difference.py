"""What differs between two models: every tensor paired with its counterpart and given a role."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.rules import Role, Rules
from dtrain.weights import Weights, digest, read_weights, tensor_bytes

ChangeRole = Role | Literal["same", "base_only"]


@dataclass(frozen=True)
class Change:
    """One tensor of a pair of models.

    Args:
        name: Its name.
        role: What is to become of it: a role of `dtrain.rules`, or `same` where both models agree bit for bit, or
            `base_only` where the fine-tuned model does not have it.
        base: The base's tensor; None for `whole`.
        tuned: The fine-tuned tensor; for `base_only` the base's.
    """

    name: str
    role: ChangeRole
    base: Tensor | None
    tuned: Tensor

    def delta(self) -> Tensor:
        """Return fine-tuned minus base as float32."""
        if self.base is None:
            raise InputError(f"tensor {self.name!r} is new in the fine-tuned model and has no delta.")
        wide = torch.promote_types(torch.promote_types(self.tuned.dtype, self.base.dtype), torch.float32)
        return (self.tuned.to(wide) - self.base.to(self.tuned.device, wide)).float()


def pair(base: Weights, tuned: Weights, rules: Rules) -> list[Change]:
    """Pair the tensors of two models.

    A tensor that is new, reshaped or of another kind of dtype in the fine-tuned model is `whole`. Where the names of
    the base stand behind a prefix in the fine-tuned model (as in a Lightning checkpoint of a wrapped model, or in a
    classifier around an encoder), the prefix is taken off; names without it stay as they are.

    Returns:
        One change per tensor of either model, ascending by the UTF-8 bytes of the name; new tensors that a rule drops
        are left out.

    Raises:
        InputError: If no tensor of one can be paired with one of the other, if nothing differs, or if a pattern of the
            rules matches nothing.
    """
    tuned = _without_prefix(base, tuned)
    rules.check({*tuned.tensors, *base.tensors})
    changes = [
        change
        for name, tensor in tuned.tensors.items()
        for known in _known_names(base, tuned, name)
        if (change := _change(known, base.get(known), tensor, _role(base, tuned, known, name, rules))) is not None
    ]
    used = {base.aliases.get(name, name) for name in [*tuned.tensors, *tuned.aliases]}
    changes += [Change(name, "base_only", tensor, tensor) for name, tensor in base.tensors.items() if name not in used]
    _refuse_nothing(base, tuned, changes)
    return sorted(changes, key=lambda change: change.name.encode())


def _refuse_nothing(base: Weights, tuned: Weights, changes: Sequence[Change]) -> None:
    if all(
        change.role == "base_only" or (change.role == "whole" and not _fits(base.get(change.name), change.tuned))
        for change in changes
    ):
        raise InputError(
            f"no tensor of {tuned.origin} fits one of {base.origin} by name and shape "
            f"({next(iter(tuned.tensors))!r} and {next(iter(base.tensors))!r}, say). Give two checkpoints of one model."
        )
    kept = [change for change in changes if change.role not in ("same", "base_only")]
    if all(change.role == "whole" and _is_base(base.get(change.name), change.tuned) for change in kept):
        raise InputError(
            f"{tuned.origin} equals its base {base.origin}: there is no delta. Give the weights after fine-tuning."
        )
    if all(change.role in ("drop", "embedding") for change in kept):
        raise InputError(
            "every tensor that changed stays at the base by `drop` or `embeddings`: nothing is left. Give narrower "
            "patterns, or none."
        )


def _fits(base: Tensor | None, tuned: Tensor) -> bool:
    """Return whether a change could be added to the base's tensor."""
    if base is None or base.shape != tuned.shape:
        return False
    return base.dtype == tuned.dtype or (base.dtype.is_floating_point and tuned.dtype.is_floating_point)


def _is_base(base: Tensor | None, tuned: Tensor) -> bool:
    return base is not None and base.shape == tuned.shape and base.dtype == tuned.dtype and _same_bits(base, tuned)


def digests(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the SHA-256 of every tensor; several at a time, since hashing releases the interpreter."""
    if torch.get_num_threads() == 1:
        return {name: digest(tensor) for name, tensor in tensors.items()}
    with ThreadPoolExecutor(max_workers=torch.get_num_threads()) as pool:
        return dict(zip(tensors, pool.map(digest, tensors.values()), strict=True))


def fingerprint(named: Iterable[tuple[str, bytes]]) -> bytes:
    """Return one SHA-256 for a whole base from the names and digests of its tensors, in the order of the names."""
    sha = hashlib.sha256()
    for name, value in sorted((name.encode(), value) for name, value in named):
        sha.update(len(name).to_bytes(4, "little") + name + value)
    return sha.digest()


def _role(base: Weights, tuned: Weights, known: str, name: str, rules: Rules) -> Role:
    """Return the role of the tensor that the base calls `known` and the fine-tuned model `name`.

    A file of a tied model holds one of its names, a module all of them: it is an embedding by any.
    """
    tensor = tuned.tensors[name]
    role = rules.role(known, tensor.shape, tensor.dtype)
    if role != "method":
        return role
    others = {*_names(tuned, name), *_names(base, base.aliases.get(known, known))}
    found = {rules.role(other, tensor.shape, tensor.dtype) for other in others}
    return "embedding" if "embedding" in found else role


def _change(name: str, base: Tensor | None, tuned: Tensor, role: Role) -> Change | None:
    if not _fits(base, tuned):
        return None if role == "drop" else Change(name, "whole", None, tuned)
    if role != "whole" and _is_base(base, tuned):
        return Change(name, "same", base, tuned)
    return Change(name, role, None if role == "whole" else base, tuned)


def _known_names(base: Weights, tuned: Weights, name: str) -> list[str]:
    """Return the names a fine-tuned tensor has in the base: one per tensor there, or its own where there is none.

    A file of a tied model holds one of its names, not always the first; a base may hold two tensors that are one here.
    """
    group = _names(tuned, name)
    found = {base.aliases.get(known, known): known for known in reversed(group) if base.get(known) is not None}
    return sorted(found.values()) or [name]


def _names(weights: Weights, name: str) -> list[str]:
    """Return all names of the tensor that `name`, the first of them, has."""
    return [name, *sorted(alias for alias, other in weights.aliases.items() if other == name)]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Compare bit patterns: NaN equals itself here, and -0.0 differs from 0.0."""
    return torch.equal(tensor_bytes(a), tensor_bytes(b))


def prefix_of(base: Weights, tuned: Weights) -> str:
    """Return the prefix, if any, without which more of the fine-tuned names are the base's than with it."""
    names = [*tuned.tensors, *tuned.aliases]
    plain = sum(base.get(name) is not None for name in names)
    matches = Counter(
        name[: dot + 1]
        for name in names
        for dot, char in enumerate(name)
        if char == "." and base.get(name[dot + 1 :]) is not None
    ).most_common(2)
    if not matches or matches[0][1] <= plain or (len(matches) > 1 and matches[0][1] == matches[1][1]):
        return ""
    return matches[0][0]


def _without_prefix(base: Weights, tuned: Weights) -> Weights:
    """Rename the fine-tuned tensors by their prefix, if any."""
    if not (prefix := prefix_of(base, tuned)):
        return tuned
    names = [*tuned.tensors, *tuned.aliases]
    # By every name: the first name of a tied tensor may lie outside the prefix.
    short = {name: name.removeprefix(prefix) for name in names}
    if len(set(short.values())) != len(names):
        raise InputError(
            f"{tuned.origin} has names both with and without the prefix {prefix!r}, which {base.origin} does not have. "
            "Take the prefix off yourself, and give a state dict."
        )
    renamed = read_weights({short[name]: tensor for name in names if (tensor := tuned.get(name)) is not None})
    return replace(renamed, origin=tuned.origin)
