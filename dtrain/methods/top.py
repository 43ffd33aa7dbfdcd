"""The greatest elements, found exactly and the same on every machine."""

from __future__ import annotations

import torch
from torch import Tensor

from dtrain.methods.method import Deltas

_HALF = 1 << 16


def top_positions(score: Tensor, count: int) -> Tensor:
    """Return the positions of the `count` greatest scores of each row; of equal ones the first.

    Args:
        score: Shape (rows, columns), not negative.
        count: How many to keep of each row.

    Returns:
        int64, ascending, positions in the flattened matrix.
    """
    columns = score.shape[1]
    if not count:
        return torch.empty(0, dtype=torch.int64)
    least = score.kthvalue(columns - count + 1, dim=1, keepdim=True).values
    above, equal = score > least, score == least
    missing = count - above.sum(1, keepdim=True)
    return (above | (equal & (equal.cumsum(1) <= missing))).reshape(-1).nonzero().view(-1)


def top_share(score: Tensor, keep: float) -> Tensor:
    """Return the positions of the greatest scores of each row, a share `keep` of all.

    Where that is no whole number in a row, the rows with the greatest next score get one more.

    Args:
        score: Shape (rows, columns), not negative.
        keep: Share of the elements, in (0, 1].

    Returns:
        int64, ascending, positions in the flattened matrix.
    """
    rows, columns = score.shape
    wanted = round(keep * score.numel())
    each = wanted // max(rows, 1)
    if wanted == each * rows:
        return top_positions(score, each)
    following = score.kthvalue(columns - each, dim=1).values
    more = torch.zeros(rows, dtype=torch.bool)
    more[top_positions(following[None], wanted - each * rows)] = True
    fewer = top_positions(score, each).view(rows, each)[~more]
    return torch.cat([fewer.view(-1), top_positions(score, each + 1).view(rows, -1)[more].view(-1)]).sort().values


def nonzero_at(values: Tensor, positions: Tensor) -> Tensor:
    """Return those of `positions` in the flattened `values` that hold no 0: it has no sign, and need not be stored."""
    return positions[(values.reshape(-1)[positions] != 0).to(positions.device)]


def top_threshold(deltas: Deltas, keep: float) -> float:
    """Return the greatest t such that at least a share `keep` of all elements of all deltas have |D| >= t.

    Two passes of counting instead of one sort: the order of positive floats is that of their bit patterns, whose upper
    half is counted first. So it takes the memory of one tensor, and no sample.
    """
    counts = _count(deltas, None)
    wanted = round(keep * int(counts.sum()))
    if not wanted:
        return float("inf")
    upper = _last(counts, wanted)
    above = int(counts[upper + 1 :].sum())
    lower = _last(_count(deltas, upper), wanted - above)
    return float(torch.tensor(upper * _HALF + lower, dtype=torch.int32).view(torch.float32))


def _count(deltas: Deltas, upper: int | None) -> Tensor:
    """Count the upper halves of the bit patterns of |D|, or the lower halves of those that begin with `upper`."""
    total = torch.zeros(_HALF, dtype=torch.int64)
    for _, get in deltas:
        pattern = get().reshape(-1).abs().cpu().view(torch.int32)
        high = pattern >> 16
        chosen = high if upper is None else (pattern & (_HALF - 1))[high == upper]
        total += torch.bincount(chosen, minlength=_HALF)
    return total


def _last(counts: Tensor, wanted: int) -> int:
    """Return the greatest index such that the counts from it on add up to `wanted` at least."""
    from_end = counts.flip(0).cumsum(0)
    return len(counts) - 1 - int((from_end < wanted).sum())
