"""Select: which positions of a flattened tensor are stored. A random selection is a seed and costs no bytes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.philox import stream_key, words
from dtrain.stages.transform import Grid

_TABLE_BITS = 12  # of a draw, to look up where its search begins
_GAP_TABLE = 1024  # gaps are drawn as 1024 * high + low, so that both tables stay short at any keep rate
_ONE = 1 << 128  # fixed point of the tables: exact to 2**-32 after any number of products we make
_STRIDE_BITS = 12  # fractional bits of a stratum's length
MIN_KEEP = 2.0**-24


@dataclass(frozen=True)
class All:
    """Every position."""

    tag: ClassVar[int] = 0
    layout: ClassVar[str] = ""

    def positions(self, name: str, grid: Grid, device: torch.device | str = "cpu") -> None:
        """Return None: no positions are needed where all are kept."""

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return the least and the greatest number of kept positions."""
        return math.prod(grid), math.prod(grid)


@dataclass(frozen=True)
class Bernoulli:
    """Every position with probability `keep`, independently (DARE's mask), in time proportional to what is kept.

    The distance from one kept position to the next is geometric. It is drawn from Philox words by integer tables, two
    words a gap; the result is Bernoulli up to a probability of 2**-32 per draw.

    Args:
        keep: Probability that a position is kept, in [2**-24, 1).
        seed: Seed of the mask, in [0, 2**64). One seed gives every tensor its own mask, by its name.
    """

    keep: float
    seed: int
    tag: ClassVar[int] = 1
    layout: ClassVar[str] = "dQ"

    def __post_init__(self) -> None:
        check_mask(self.keep, self.seed)

    def positions(self, name: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the kept positions of the tensor called `name`: int64, ascending, all less than rows * columns."""
        numel = math.prod(grid)
        key = stream_key(self.seed, name)
        reach = (numel // _GAP_TABLE).bit_length()  # what lies beyond the tensor's end need not be told apart
        low, high = (table.to(device) for table in _gap_tables(self.keep, reach))
        found: list[Tensor] = []
        last, drawn = -1, 0
        while last < numel - 1:
            missing = (numel - 1 - last) * self.keep
            # Enough gaps to end in one round nearly always; the words consumed per gap do not depend on the round.
            gaps = 2 * math.ceil((missing + 4 * math.sqrt(missing) + 8) / 2)
            pair = words(key, 2 * drawn, 2 * gaps, device).view(-1, 2)
            gap = _GAP_TABLE * high.invert(pair[:, 1]) + low.invert(pair[:, 0])
            positions = torch.cumsum(gap + 1, 0) + last
            found.append(positions)
            last, drawn = int(positions[-1]), drawn + gaps
        joined = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=device)
        return joined[: int(torch.searchsorted(joined, numel))]

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return counts outside which no honest mask falls (12 standard deviations)."""
        numel = math.prod(grid)
        slack = 12 * math.sqrt(numel * self.keep) + 12
        return max(0, math.floor(numel * self.keep - slack)), min(numel, math.ceil(numel * self.keep + slack))


@dataclass(frozen=True)
class Stratified:
    """One random position out of every run of `1 / keep` (DeltaDQ's group dropout with one survivor a group).

    Cell j covers the real interval [j / keep, (j + 1) / keep); its survivor is the floor of a uniform draw from it.
    With an integer 1/keep every group of that many neighbours keeps exactly one. Otherwise a position on a cell's
    border may be drawn from both sides and is then kept once, so its chance falls short of `keep` by at most
    keep**2 / 4. Above one half, the *dropped* positions are the stratified ones.

    Args:
        keep: Share of positions kept, in [2**-24, 1 - 2**-24].
        seed: Seed of the mask, in [0, 2**64). One seed gives every tensor its own mask, by its name.
    """

    keep: float
    seed: int
    tag: ClassVar[int] = 2
    layout: ClassVar[str] = "dQ"

    def __post_init__(self) -> None:
        check_mask(self.keep, self.seed)
        if 1 - self.keep < MIN_KEEP:
            raise InputError(
                f"`keep` of a stratified mask must be 1 or at most 1 - 2**-24, got {self.keep}. Use keep=1."
            )

    def positions(self, name: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the kept positions of the tensor called `name`: int64, ascending, all less than rows * columns."""
        numel = math.prod(grid)
        rate = min(self.keep, 1 - self.keep)
        # Division and rounding of binary64 are exact by IEEE 754, so this integer is the same everywhere.
        stride = round((1 << _STRIDE_BITS) / rate)
        cells = -(-(numel << _STRIDE_BITS) // stride)
        draw = words(stream_key(self.seed, name), 0, -(-cells // 4) * 4, device)[:cells]
        start = torch.arange(cells, dtype=torch.int64, device=device) * stride
        drawn = (start + scaled(draw, stride)) >> _STRIDE_BITS
        drawn = cast("Tensor", torch.unique_consecutive(drawn[drawn < numel]))
        if self.keep <= 0.5:
            return drawn
        kept = torch.ones(numel, dtype=torch.bool, device=device)
        kept[drawn] = False
        return kept.nonzero().view(-1)

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return the least and the greatest number of kept positions."""
        numel = math.prod(grid)
        rate = min(self.keep, 1 - self.keep)
        most = min(numel, math.ceil(numel * rate * (1 + 2.0**-10)) + 1)
        least = max(0, most // 2 - 2)  # a border has two cells; the last may draw past the end
        return (least, most) if self.keep <= 0.5 else (numel - most, numel - least)


def random_mask(kind: str, keep: float, seed: int) -> All | Bernoulli | Stratified:
    """Return the selection called `kind` ("bernoulli" or "stratified") at rate `keep`; `keep=1` is everything."""
    if kind not in ("bernoulli", "stratified"):
        raise InputError(f"`mask` must be 'bernoulli' or 'stratified', got {kind!r}.")
    if keep == 1:
        return All()
    return Bernoulli(keep, seed) if kind == "bernoulli" else Stratified(keep, seed)


def check_mask(keep: float, seed: int) -> None:
    """Refuse a keep rate or a seed that a file cannot hold."""
    if not MIN_KEEP <= keep < 1:
        raise InputError(f"`keep` must be in [2**-24, 1], got {keep}. Use keep=0.01 to keep 1 % of the delta.")
    if not 0 <= seed < 1 << 64:
        raise InputError(f"`seed` must be in [0, 2**64), got {seed}.")


def scaled(draw: Tensor, stride: int) -> Tensor:
    """Return floor(draw * stride / 2**32) without leaving 63 bits: `stride` may have 37."""
    high, low = stride >> 16, stride & 0xFFFF
    return (draw * high + ((draw * low) >> 16)) >> 16


class _Table(NamedTuple):
    """Descending 32-bit integers, the last of them 0, to look up how many are greater than a draw.

    Args:
        entries: int64.
        least: For the upper bits of a draw: how many entries are greater than every draw that begins with them.
    """

    entries: Tensor
    least: Tensor

    @classmethod
    def of(cls, entries: list[int]) -> _Table:
        table = torch.tensor([*entries, 0], dtype=torch.int64)
        greatest = ((torch.arange(1 << _TABLE_BITS) + 1) << (32 - _TABLE_BITS)) - 1
        return cls(table, torch.searchsorted(-table, -greatest))

    def to(self, device: torch.device | str) -> _Table:
        return _Table(self.entries.to(device), self.least.to(device))

    def invert(self, draw: Tensor) -> Tensor:
        """Return for every draw how many entries are greater than it."""
        if len(self.entries) == 1:
            return torch.zeros_like(draw)
        found = self.least.index_select(0, draw >> (32 - _TABLE_BITS))
        found += self.entries.index_select(0, found) > draw  # which is mostly enough
        behind = (self.entries.index_select(0, found) > draw).nonzero().view(-1)
        if behind.numel():
            found[behind] = torch.searchsorted(-self.entries, -draw[behind])
        return found


@functools.lru_cache(maxsize=16)
def _gap_tables(keep: float, reach: int) -> tuple[_Table, _Table]:
    """Return P(low >= g) and P(high >= g) for g = 1, 2, ..., at most 2**reach, as 32-bit integers, descending.

    A geometric gap splits into two independent parts, 1024 * high + low: `high` is geometric with the 1024th power of
    the failure rate, `low` is the same geometric law cut off at 1024.
    """
    miss = _ONE - (int(keep * 2.0**80) << 48)  # exact: the last bit of a binary64 above 2**-24 is above 2**-80
    power: int = _ONE
    low_powers: list[int] = []
    for _ in range(_GAP_TABLE):
        power = power * miss >> 128
        low_powers.append(power)
    cut = low_powers.pop()
    low = [((p - cut) << 32) // (_ONE - cut) for p in low_powers]
    high: list[int] = []
    tail = cut
    while tail >> 96 and len(high) < 1 << reach:
        high.append(tail >> 96)
        tail = tail * cut >> 128
    return _Table.of(low), _Table.of(high)
