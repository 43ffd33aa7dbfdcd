"""Tensor names in a few bytes each: a name is written as its difference from an earlier one.

The names of layer 7 are those of layer 6 with another number, so about five bytes hold what JSON would hold in fifty.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from dtrain.errors import InputError

#: Every record may borrow the name of the one before: the bounds keep a small file from growing in memory.
MAX_NAME, MAX_ALL_NAMES = 1 << 14, 1 << 26
_DIGITS = re.compile(rb"\d+")


class NameCode(NamedTuple):
    """A name as `reference[:prefix] + middle + reference[len(reference) - suffix:]`.

    Args:
        back: How many names earlier the reference stands; 0 for no reference.
        prefix: Bytes taken from its start.
        suffix: Bytes taken from its end.
        middle: The bytes between them.
    """

    back: int
    prefix: int
    suffix: int
    middle: bytes


def shorten(names: Sequence[bytes]) -> list[NameCode]:
    """Return one code per name; the reference is the name before, or the last one that differs in numbers only."""
    if names and len(max(names, key=len)) > MAX_NAME:
        raise InputError(f"a tensor name is longer than {MAX_NAME} bytes. Give the module a shorter name.")
    codes: list[NameCode] = []
    latest: dict[bytes, int] = {}
    for index, name in enumerate(names):
        shape = _DIGITS.sub(b"0", name)
        candidates = {latest.get(shape, index), max(index - 1, 0)} - {index}
        options = [_difference(names[at], name, index - at) for at in sorted(candidates)]
        codes.append(min([*options, NameCode(0, 0, 0, name)], key=lambda code: len(code.middle)))
        latest[shape] = index
    return codes


def restore(code: NameCode, earlier: Sequence[bytes]) -> bytes:
    """Return the name that `code` stands for, given the names before it.

    Raises:
        ValueError: If the code refers to bytes that are not there.
    """
    if code.back == 0:
        if code.prefix or code.suffix:
            raise ValueError("a name without a reference borrows bytes")
        if len(code.middle) > MAX_NAME:
            raise ValueError(f"a name is longer than {MAX_NAME} bytes")
        return code.middle
    if code.back > len(earlier):
        raise ValueError("a name refers to one before the first")
    reference = earlier[-code.back]
    if code.prefix + code.suffix > len(reference):
        raise ValueError("a name borrows more bytes than its reference has")
    if code.prefix + len(code.middle) + code.suffix > MAX_NAME:
        raise ValueError(f"a name is longer than {MAX_NAME} bytes")
    return reference[: code.prefix] + code.middle + reference[len(reference) - code.suffix :]


def _difference(reference: bytes, name: bytes, back: int) -> NameCode:
    prefix = _common(reference, name)
    room = min(len(reference), len(name)) - prefix
    suffix = _common(reference[::-1][:room], name[::-1][:room])
    return NameCode(back, prefix, suffix, name[prefix : len(name) - suffix])


def _common(a: bytes, b: bytes) -> int:
    """Return the length of the common beginning, by bisection: a file may bring long names."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
