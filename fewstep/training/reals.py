"""Real samples for the GAN: latents under their own captions, as a pure function of the global sample index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor

from fewstep.teachers.base import Latents, Reals
from fewstep.training.embeddings import StoredConditions
from fewstep.training.latents import StoredLatents
from fewstep.training.order import Order
from fewstep.training.prompts import text_blocks
from fewstep.types import Condition, Real


class RealData:
    """Latents of real samples and their captions' conditions, shuffled anew each epoch.

    Sample i of the run gets row permutation(seed, i // N)[i % N], whatever the number of processes.  The order is
    independent of the prompts'.  Both latents and conditions may lie on the disk.
    """

    def __init__(
        self, reals: Reals, encode: Callable[[Sequence[str]], Condition | StoredConditions], seed: int
    ) -> None:
        self._latents, captions = reals.latents, reals.captions
        self.order = Order("reals", seed, len(captions))
        digest = sha256()
        for block in chain(_blocks(self._latents), text_blocks(captions)):
            digest.update(block)
        self.digest = digest.hexdigest()
        self._rows: Tensor | None = None
        if isinstance(captions, tuple):  # few enough to encode each different one once
            known = {caption: row for row, caption in enumerate(dict.fromkeys(captions))}
            self._rows = torch.tensor([known[caption] for caption in captions])
            captions = tuple(known)
        self._conditions = encode(captions)

    def batch(self, sample_ids: Sequence[int], device: torch.device | str = "cpu") -> Real:
        """The real samples of these global sample indices, float32."""
        rows = self.order.rows(sample_ids)
        cond = self._conditions[rows if self._rows is None else self._rows[rows]]
        return Real(self._latents[rows].float().to(device), cond.to(device))


def _blocks(latents: Tensor | Latents) -> Iterator[bytes]:
    """What tells latents from others: their bytes, or the checksums of those that are too many to read."""
    if isinstance(latents, Tensor):
        yield latents.contiguous().view(torch.uint8).numpy().tobytes()
    else:
        assert isinstance(latents, StoredLatents)
        yield from latents.checksums()
