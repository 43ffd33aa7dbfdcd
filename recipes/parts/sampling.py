"""Orders of examples that waste little on padding, and batches of which some can be held out."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 16  # batches that are sorted by length together
GOLDEN = (5**0.5 - 1) / 2


class SimilarLengths(Sampler[int]):
    """A shuffled order in which batches have examples of similar lengths.

    It follows from seed and epoch, which `parts.training.OrderOfEpoch` tells. What does not fill a batch is left
    out, and is another part every epoch.

    Args:
        lengths: Length of every example, in any unit.
        batch_size: Examples per batch.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()[: len(self)]
        for pool in range(0, len(order), POOL * self.batch_size):
            near = sorted(order[pool : pool + POOL * self.batch_size], key=self.lengths.__getitem__)
            for batch in torch.randperm(len(near) // self.batch_size, generator=generator).tolist():
                yield from near[batch * self.batch_size : (batch + 1) * self.batch_size]


def representative(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Return a fixed order of all examples: batches have similar lengths, the first few of all lengths."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0)).tolist()
    count = len(order) // batch_size
    near = sorted(order[: count * batch_size], key=lengths.__getitem__)
    # Multiples of the golden ratio lie evenly, however many: the middle batch comes first, then one from either side.
    batches = sorted(range(count), key=lambda batch: (batch - count // 2) * GOLDEN % 1)
    return [near[batch * batch_size + row] for batch in batches for row in range(batch_size)] + order[len(near) :]


def in_two(rows: int, batch_size: int) -> int:
    """Return a batch size of which there are two batches: one to learn scales from, one that says when to stop."""
    return max(1, min(batch_size, -(-rows // 2)))
