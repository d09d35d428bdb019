"""In which order samples visit rows: every row once an epoch, as a pure function of seed, epoch and index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.rng import key

LARGE = 2**20
"""Rows above which an epoch's order is computed number by number: a list of ten million takes 80 MB and a second."""
ROUNDS = 6
"""Luby and Rackoff (1988) prove four enough where few of very many numbers are seen; here all of them are."""


class Order:
    """Sample i of the run gets row permutation(seed, i // count)[i % count], whatever the number of processes.

    name: tells the orders of one seed apart.
    """

    def __init__(self, name: str, seed: int, count: int) -> None:
        self.name, self.seed, self.count = name, seed, count
        self._listed = lru_cache(maxsize=2)(self._permutation)

    def rows(self, sample_ids: Sequence[int]) -> Tensor:
        """The rows of these global sample indices, [B] int64."""
        return torch.tensor([self._row(*divmod(i, self.count)) for i in sample_ids])

    def _row(self, epoch: int, index: int) -> int:
        if self.count == 1:  # an epoch is a sample long: there would be one permutation for each
            return 0
        if self.count <= LARGE:
            return int(self._listed(epoch)[index])
        return permuted(index, self.count, key(self.seed, self.name, epoch))

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(self.seed, self.name, epoch))
        return torch.randperm(self.count, generator=generator)


def permuted(index: int, count: int, seed: int) -> int:
    """Where a permutation of 0..count-1, one for each seed, takes an index: a Feistel network, walked along its cycle.

    (left, right) -> (right, left xor f(right)), round after round, permutes the numbers of 2 b bits whatever f is.
    With 4^(b - 1) < count <= 4^b it is applied until it gives a number below count: less than four times on average.
    """
    bits = ((count - 1).bit_length() + 1) // 2
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (key(seed, turn, right) & mask)
        index = left << bits | right
        if index < count:
            return index
