"""Philox4x32-10, the counter-based generator behind every mask that is stored as a seed.

Integer arithmetic only, so the same seed gives the same words on every device, thread count and version of torch.

Source: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011; test vectors from Random123.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF
_BLOCKS_PER_CHUNK = 1 << 15  # four int64 lanes of this length stay in a 2 MB cache


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Return one 128-bit block per counter.

    Args:
        counter: Four int64 tensors of one shape, each value in [0, 2**32).
        key: Two 32-bit words.

    Returns:
        Four int64 tensors of that shape, values in [0, 2**32), word 0 first.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # torch has no unsigned 64-bit product; the signed one wraps to the same bits, and the mask drops the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = (p0 >> 32).bitwise_and_(_MASK32).bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = p1.bitwise_and_(_MASK32), p0.bitwise_and_(_MASK32)
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return [c0, c1, c2, c3]


def stream_key(seed: int, name: str) -> tuple[int, int]:
    """Return the Philox key of the stream that belongs to `seed` and the tensor called `name`."""
    digest = hashlib.sha256(seed.to_bytes(8, "little") + name.encode()).digest()
    return int.from_bytes(digest[0:4], "little"), int.from_bytes(digest[4:8], "little")


def words(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Return words `start` to `start + count` of a stream.

    Word `w` of a stream is word `w % 4` of the block whose 128-bit counter is `w // 4`.

    Args:
        key: The stream, from `stream_key`.
        start: Index of the first word, a multiple of 4.
        count: Number of words, a multiple of 4.
        device: Where to compute them; the values do not depend on it.

    Returns:
        int64 of shape (count,), values in [0, 2**32).
    """
    out = torch.empty(count, dtype=torch.int64, device=device)
    for first in range(0, count // 4, _BLOCKS_PER_CHUNK):
        last = min(first + _BLOCKS_PER_CHUNK, count // 4)
        index = torch.arange(start // 4 + first, start // 4 + last, dtype=torch.int64, device=device)
        zero = torch.zeros_like(index)
        block = philox4x32((index & _MASK32, index >> 32, zero, zero), key)
        out[4 * first : 4 * last] = torch.stack(block, dim=1).view(-1)
    return out


def random_order(seed: int, name: str, levels: Tensor) -> Tensor:
    """Return the positions of `levels` by level, the least first, and in random order within each.

    Args:
        seed: Seed of the order.
        name: The tensor's name, which picks its stream.
        levels: Whole numbers in [0, 2**31), of any dtype, shape (n,).

    Returns:
        int64 of shape (n,): within a level that of the words; of equal words the first position comes first.
    """
    count = levels.numel()
    drawn = words(stream_key(seed, name), 0, -(-count // 4) * 4)[:count]
    return torch.sort((levels.long() << 32) | drawn, stable=True).indices
