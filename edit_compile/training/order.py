"""Data order and seeds as pure functions of (seed, step): what makes a resumed run equal to an uninterrupted one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


def seed_of(*parts: int) -> int:
    """Mix integers into one 63-bit seed (SplitMix64 steps); a pure function, the same on every machine."""
    mask, state = (1 << 64) - 1, 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


class StepSampler(Sampler[list[int]]):
    """Batches of indices for micro steps `start`, `start` + 1, ...: endless, and a pure function of its arguments.

    Epochs are permutations of the dataset laid end to end; micro step m of `world` processes takes the next
    `world * batch_size` positions, and rank r the r-th slice of them.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int = 0, rank: int = 0, world: int = 1) -> None:
        if length < 1:
            raise ValueError("the dataset is empty: training needs at least one sample")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.start, self.rank, self.world = start, rank, world
        self._epochs: dict[int, list[int]] = {}

    def __iter__(self) -> Iterator[list[int]]:
        micro_step = self.start
        while True:
            first = (micro_step * self.world + self.rank) * self.batch_size
            yield [self._index(position) for position in range(first, first + self.batch_size)]
            micro_step += 1

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, self.length)
        if epoch not in self._epochs:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
            self._epochs = {e: o for e, o in self._epochs.items() if e >= epoch - 1} | {epoch: order}
        return self._epochs[epoch][offset]
