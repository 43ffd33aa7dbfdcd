"""Bits by formula."""

from __future__ import annotations

import math


def binary_entropy(share: float) -> float:
    """Return H(share) in bits: what one position costs of a random selection that is stored."""
    if share in (0.0, 1.0):
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
