"""An order of training examples that wastes little on padding."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 16  # batches that are sorted by length together


class SimilarLengths(Sampler[int]):
    """A shuffled order in which batches have examples of similar lengths.

    It follows from seed and epoch; Lightning calls `set_epoch`, also after a resume. What does not fill a batch is left
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
