"""Pairs of handwritten digits with a statement that is true or false of them: NLVR2's task, made on the spot.

Every kind of statement is drawn so that neither the statement nor the two images alone say anything about the answer:
the answer is chosen first, each kind has a twin that means the opposite, and the digits are uniform given the answer.
One image and the statement do not suffice either, but for `shows` (where the statement names the image that counts)
and, in part, for `order`: a nine is never the smaller digit. Its digits are near each other to keep that small.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dtrain.errors import InputError
from parts.images import Labelled

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = "the left right two both image images show shows digit digits same different sum of is even odd larger smaller"
NEAR = 3  # digits of `order` are at most so far apart
PAD = 1

PairBatch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # left, right, tokens, padding (True is padding), labels
Claim = tuple[int, int, str]  # left digit, right digit, statement


def shows(rng: np.random.Generator, true: bool) -> Claim:
    """One image decides, and the statement says which: "the left image shows the digit seven"."""
    digits, side = rng.integers(10, size=2), rng.integers(2)
    named = digits[side] if true else (digits[side] + rng.integers(1, 10)) % 10
    return *digits, f"the {('left', 'right')[side]} image shows the digit {NUMBERS[named]}"


def same(rng: np.random.Generator, true: bool) -> Claim:
    """Whether the two images show one digit, or two."""
    claimed = rng.integers(2)
    left = rng.integers(10)
    right = left if claimed == true else (left + rng.integers(1, 10)) % 10
    return left, right, ("the two images show different digits", "both images show the same digit")[claimed]


def parity(rng: np.random.Generator, true: bool) -> Claim:
    """Whether the sum is even, or odd."""
    odd = rng.integers(2)
    left = rng.integers(10)
    right = 2 * rng.integers(5) + (left + odd + (not true)) % 2
    return left, right, f"the sum of the two digits is {('even', 'odd')[odd]}"


def order(rng: np.random.Generator, true: bool) -> Claim:
    """Which image shows the larger, or the smaller, digit; the digits are near each other."""
    near = [(low, high) for low in range(10) for high in range(low + 1, min(low + NEAR, 9) + 1)]
    pair = near[rng.integers(len(near))]
    side, larger = rng.integers(2), rng.integers(2)
    is_larger = larger == true  # of the digit on the named side
    left, right = pair if (side == 1) == is_larger else pair[::-1]
    return left, right, f"the {('left', 'right')[side]} image shows the {('smaller', 'larger')[larger]} digit"


KINDS: dict[str, Callable[[np.random.Generator, bool], Claim]] = {
    "shows": shows,
    "same": same,
    "parity": parity,
    "order": order,
}


class WordTokenizer:
    """Words to ids, with the ids of BEiT-3's special tokens: <s> 0, pad 1, </s> 2, unknown 3."""

    def __init__(self) -> None:
        words = sorted({*WORDS.split(), *NUMBERS})
        self.ids = {word: index for index, word in enumerate(words, start=4)}

    def __len__(self) -> int:
        return len(self.ids) + 4

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a statement, between <s> and </s>."""
        return [0, *(self.ids.get(word, 3) for word in text.lower().split()), 2]


def pad_tokens(statements: Sequence[Sequence[int]], most: int = 64) -> tuple[Tensor, Tensor]:
    """Return ids (n, longest) and where they are padding; a long statement loses its last words, and keeps its </s>.

    Args:
        statements: Ids of every statement, with <s> and </s>.
        most: Ids that are kept of one statement.
    """
    cut = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in statements]
    longest = max(map(len, cut))
    tokens = torch.tensor([[*ids, *[PAD] * (longest - len(ids))] for ids in cut])
    lengths = torch.tensor([len(ids) for ids in cut])
    return tokens, torch.arange(longest) >= lengths[:, None]


def draw_pairs(
    digits: Labelled, count: int, kinds: Sequence[str], tokenizer: Callable[[str], list[int]], seed: Sequence[int]
) -> PairBatch:
    """Return `count` pairs of images with statements; every kind has as many true as false ones.

    Args:
        digits: The images to draw from, and which digits they show.
        count: How many pairs.
        kinds: Kinds of statements, see `KINDS`; all of them if empty.
        tokenizer: Statement to ids.
        seed: Of the draw.
    """
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise InputError(f"--data.kinds names {unknown}; the kinds of statements are {list(KINDS)}.")
    images, labels = digits
    rng = np.random.default_rng(seed)
    shown = [np.flatnonzero(labels.numpy() == digit) for digit in range(10)]
    chosen = [KINDS[kind] for kind in kinds or KINDS]
    answers = [index // len(chosen) % 2 for index in range(count)]
    claims = [chosen[index % len(chosen)](rng, bool(answer)) for index, answer in enumerate(answers)]
    left, right = (torch.tensor([rng.choice(shown[claim[side]]) for claim in claims]) for side in (0, 1))
    tokens, padding = pad_tokens([tokenizer(statement) for *_, statement in claims])
    return images[left], images[right], tokens, padding, torch.tensor(answers)
