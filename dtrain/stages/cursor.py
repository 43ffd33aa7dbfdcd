"""Numbers of variable length, and a reader that never runs past the end of its bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")


def varint(value: int) -> bytes:
    """Return unsigned LEB128: seven bits a byte, least significant first, the top bit says that more follow."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class Cursor:
    """Reads forward through bytes and never past their end.

    Args:
        data: The bytes.
        what: What they are, for messages.
    """

    def __init__(self, data: bytes | memoryview, what: str = "payload") -> None:
        self._data, self._what, self._at = data, what, 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        """Read `size` bytes."""
        start, stop = self._at, self._at + size
        if stop > len(self._data):
            raise ValueError(f"the {self._what} ends after {self.left} of {size} bytes")
        self._at = stop
        return bytes(self._data[start:stop])

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """Read the fields of a `struct` layout."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))

    def varint(self) -> int:
        """Read one number in its shortest spelling."""
        value = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                if byte == 0 and shift:
                    raise ValueError("a number is written in more bytes than it needs")  # one number, one spelling
                return value
        raise ValueError("a number is longer than 63 bits")

    def sequence(self, read: Callable[[], _T], limit: int | None = None) -> list[_T]:
        """Read a count and as many items."""
        count = self.varint()
        most = min(self.left, limit or count)  # every item takes a byte at least: no allocation beyond the file
        if count > most:
            raise ValueError(f"a list has {count} items where {most} are the most")
        return [read() for _ in range(count)]

    def choose(self, options: list[_T]) -> _T:
        """Read a number that points into `options`."""
        index = self.varint()
        if index >= len(options):
            raise ValueError(f"item {index} of a list of {len(options)} is referred to")
        return options[index]
