"""Which prompts a step works on: a pure function of the global sample index, so there is no position to lose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256

import torch

from fewstep.rng import key
from fewstep.sampling import Advance
from fewstep.teachers.base import PromptEncoder
from fewstep.training.pairs import PairData
from fewstep.training.reals import RealData
from fewstep.types import Batch, Condition

PIECE = 16
"""Prompts encoded between two words of progress."""


class PromptData:
    """Encoded prompts, shuffled anew each epoch.

    Sample i of the run gets prompt permutation(seed, i // N)[i % N]: every prompt once per epoch, the same on any
    number of processes.  Encoded once and kept; the encoders are free afterwards.
    reals, pairs: real samples, and pairs of the teacher's ODE, that come with each batch, under captions of their own.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: PromptEncoder,
        shape: tuple[int, ...],
        seed: int,
        progress: Advance | None = None,
        reals: RealData | None = None,
        pairs: PairData | None = None,
    ) -> None:
        self.prompts = tuple(prompts)
        self.reals, self.pairs = reals, pairs
        self.shape = shape
        self.seed = seed
        digest = sha256("\n".join(self.prompts).encode())  # prompts hold no line ends
        for more in (reals, pairs):
            if more is not None:
                digest.update(more.digest.encode())
        self.digest = digest.hexdigest()
        self._conditions = _encoded(self.prompts, encode, progress)
        bad = [k for k, v in self._conditions.tensors.items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ValueError(
                f"the text encoder gave non-finite values in {bad}; its weights are damaged or overflow in this dtype"
            )
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> torch.Tensor:
        if len(self.prompts) == 1:  # an epoch is a sample long: there would be one permutation for each
            return torch.zeros(1, dtype=torch.long)
        generator = torch.Generator().manual_seed(key(self.seed, "prompts", epoch))
        return torch.randperm(len(self.prompts), generator=generator)

    def indices(self, sample_ids: Sequence[int]) -> torch.Tensor:
        """Which prompt each sample gets, [B] int64."""
        n = len(self.prompts)
        return torch.stack([self._epoch(i // n)[i % n] for i in sample_ids])

    def batch(self, sample_ids: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """The micro-batch of these global sample indices."""
        rows = self.indices(sample_ids)
        tensors = {k: v[rows] for k, v in self._conditions.tensors.items()}
        cond = Condition(tensors, self._conditions.null).to(device)
        real = self.reals.batch(sample_ids, device) if self.reals is not None else None
        pair = self.pairs.batch(sample_ids, device) if self.pairs is not None else None
        prompts = tuple(self.prompts[row] for row in rows.tolist())
        return Batch(cond, self.shape, tuple(sample_ids), real, pair, prompts)


def _encoded(prompts: Sequence[str], encode: PromptEncoder, progress: Advance | None) -> Condition:
    """All prompts by one call, which makes their rows equally long.

    Before it, piece by piece, so that progress can be told: an encoder that takes long keeps what it encoded.
    """
    if progress is not None:
        for start in range(0, len(prompts), PIECE):
            piece = prompts[start : start + PIECE]
            encode(piece)
            progress(len(piece))
    return encode(prompts)
