"""Random selections that follow the rows and columns of a matrix. Like all random selections they cost no bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from dtrain.errors import InputError
from dtrain.stages.philox import stream_key, words
from dtrain.stages.select import Bernoulli, check_mask
from dtrain.stages.transform import Grid

Unit = Literal["row", "column", "block"]
UNITS: tuple[Unit, ...] = get_args(Unit)
MAX_BLOCK = 1024
_WORDS_PER_CHUNK = 1 << 22
_WORDS_IN_CACHE = 1 << 17  # on the CPU: they and what is made of them stay in 2 MB


@dataclass(frozen=True)
class Groups:
    """Exactly `kept` random positions in every group of `size` neighbours of a row (DeltaDQ's group-wise dropout).

    The groups of a row start at its first column. The last one may reach past the row's end: it is drawn as if whole,
    and what lies beyond is left out, so that every position is kept with the same probability, kept / size.

    Args:
        size: Neighbours in a group, 2 to 65536. Where rows are shorter than that, groups run on across them.
        kept: Positions kept of each, from 1 to size - 1.
        seed: Seed of the mask, in [0, 2**64).
    """

    size: int
    kept: int
    seed: int
    tag: ClassVar[int] = 3
    layout: ClassVar[str] = "IIQ"

    def __post_init__(self) -> None:
        if not 1 <= self.kept < self.size <= 1 << 16:
            raise InputError(f"`kept` must be in [1, size - 1] and `size` at most 65536, got {self.kept}, {self.size}.")
        check_mask(self.kept / self.size, self.seed)

    def positions(self, name: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the kept positions of the tensor called `name`: int64, ascending, all less than rows * columns."""
        rows, columns = self._rows(grid)
        if not rows * columns:
            return torch.empty(0, dtype=torch.int64, device=device)
        key, per_row = stream_key(self.seed, name), -(-columns // self.size)
        most = _WORDS_IN_CACHE if torch.device(device).type == "cpu" else _WORDS_PER_CHUNK
        total, step = rows * per_row, max(4, most // self.size // 4 * 4)
        found: list[Tensor] = []
        for first in range(0, total, step):
            count = min(step, total - first)
            drawn = words(key, first * self.size, -(-count * self.size // 4) * 4, device)[: count * self.size]
            # The positions with the `kept` smallest words: all subsets are alike. A tie goes to the first, since a
            # position is the lower part of its key; so no two keys are equal, and any selection finds the same ones.
            keys = (drawn.view(count, self.size) << 16) | torch.arange(self.size, device=device)
            least = _least(keys, self.kept)
            group = torch.arange(first, first + count, device=device)[:, None]
            column = group % per_row * self.size + (least & 0xFFFF).sort(dim=1).values
            found.append((group // per_row * columns + column)[column < columns])
        return torch.cat(found)

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return the least and the greatest number of kept positions."""
        rows, columns = self._rows(grid)
        whole, rest = divmod(columns, self.size)
        least = max(0, rest + self.kept - self.size)
        return rows * (whole * self.kept + least), rows * (whole * self.kept + min(rest, self.kept))

    def _rows(self, grid: Grid) -> Grid:
        return grid if self.size <= grid[1] else (1, math.prod(grid))


def _least(keys: Tensor, count: int) -> Tensor:
    """Return the `count` least of every row, in any order, of shape (rows, count)."""
    if count > 1:
        return keys.topk(count, dim=1, largest=False, sorted=False).values
    # Ten times as fast as `amin` where rows are short.
    while (width := keys.shape[1]) > 1:
        half = width // 2
        less = torch.minimum(keys[:, :half], keys[:, half : 2 * half])
        keys = torch.cat([less, keys[:, 2 * half :]], dim=1) if width % 2 else less
    return keys


@dataclass(frozen=True)
class Units:
    """Whole rows, columns or square blocks, each kept with probability `keep` (structural dropping).

    Args:
        unit: "row" (an output), "column" (an input) or "block"; in a file its number 0, 1 or 2.
        block: Side of a block; 1 for rows and columns.
        keep: Probability that a unit is kept, in [2**-24, 1).
        seed: Seed of the mask, in [0, 2**64).
    """

    unit: int
    block: int
    keep: float
    seed: int
    tag: ClassVar[int] = 4
    layout: ClassVar[str] = "BIdQ"

    def __post_init__(self) -> None:
        if not 0 <= self.unit < len(UNITS):
            raise InputError(f"`unit` must be one of {', '.join(UNITS)}, got number {self.unit}.")
        if not (1 <= self.block <= MAX_BLOCK and (self.block == 1 or UNITS[self.unit] == "block")):
            raise InputError(f"`block` must be in [1, {MAX_BLOCK}], and 1 unless unit='block'; got {self.block}.")
        check_mask(self.keep, self.seed)

    def positions(self, name: str, grid: Grid, device: torch.device | str = "cpu") -> Tensor:
        """Return the kept positions of the tensor called `name`: int64, ascending, all less than rows * columns."""
        rows, columns = grid
        height, width = self._unit(grid)
        down, across = -(-rows // max(height, 1)), -(-columns // max(width, 1))
        units = Bernoulli(self.keep, self.seed).positions(name, (down, across), device)
        if not units.numel():
            return units  # a file may say that an empty tensor has columns of 2**47 elements
        r = (units // max(across, 1) * height)[:, None, None] + torch.arange(height, device=device)[None, :, None]
        c = (units % max(across, 1) * width)[:, None, None] + torch.arange(width, device=device)[None, None, :]
        return (r * columns + c)[(r < rows) & (c < columns)].sort().values

    def count_bounds(self, grid: Grid) -> tuple[int, int]:
        """Return counts outside which no honest mask falls."""
        height, width = self._unit(grid)
        units = (-(-grid[0] // max(height, 1)), -(-grid[1] // max(width, 1)))
        least, most = Bernoulli(self.keep, self.seed).count_bounds(units)
        spare = units[0] * units[1] * height * width - math.prod(grid)  # what blocks reach beyond the edges
        return max(0, least * height * width - spare), min(math.prod(grid), most * height * width)

    def _unit(self, grid: Grid) -> tuple[int, int]:
        """Return the height and width of a unit."""
        rows, columns = grid
        block = min(self.block, rows), min(self.block, columns)  # so that what reaches over an edge costs no memory
        return {"row": (1, columns), "column": (rows, 1), "block": block}[UNITS[self.unit]]
