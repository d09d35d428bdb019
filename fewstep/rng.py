"""Noise that can be replayed: every draw is keyed by what it is for, not by what was drawn before.

Hidden generator state is what makes resuming inexact and results depend on the number of processes. Here a draw is a
function of (seed, iteration, turn, stream, global sample index), so two ranks, micro-batches and one big batch see
the same noise, and a resumed run goes on with the noise of the unbroken one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b

import torch
from torch import Tensor


def key(*parts: object) -> int:
    """A 63-bit seed from any printable parts; equal parts give equal seeds on every machine and Python."""
    text = "/".join(str(part) for part in parts).encode()
    return _seed(blake2b(text, digest_size=8).digest())


def _seed(digest: bytes) -> int:
    return int.from_bytes(digest, "big") >> 1


class Rng:
    """The random numbers of one turn of one iteration.

    Each named stream can be drawn once: a second draw would silently repeat the first one's numbers.
    iteration: counted from 0; what starts late looks at it.
    """

    def __init__(
        self,
        seed: int,
        iteration: int,
        turn: str,
        sample_ids: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> None:
        self.iteration = iteration
        self._prefix = (seed, iteration, turn)
        self._draws = torch.Generator("cpu")  # one for all rows: it is seeded anew for each
        self._sample_ids = tuple(sample_ids)
        self._device = device
        self._drawn: set[str] = set()

    def _generator(self, *suffix: object) -> torch.Generator:
        return self._draws.manual_seed(key(*self._prefix, *suffix))

    def _rows(self, stream: str) -> Iterator[torch.Generator]:
        """Each sample's generator in turn, `_generator(stream, i)`, of which only the last part is hashed anew."""
        shared = blake2b("/".join(map(str, (*self._prefix, stream, ""))).encode(), digest_size=8)
        for i in self._sample_ids:
            own = shared.copy()
            own.update(str(i).encode())
            yield self._draws.manual_seed(_seed(own.digest()))

    def _claim(self, stream: str) -> None:
        if stream in self._drawn:
            raise ValueError(f"stream {stream!r} was drawn already in this turn; give each draw a name of its own")
        self._drawn.add(stream)

    def randn(self, stream: str, shape: tuple[int, ...] = ()) -> Tensor:
        """Standard normals, [B, *shape] float32."""
        self._claim(stream)
        rows = [torch.randn(shape, generator=own) for own in self._rows(stream)]
        return torch.stack(rows).to(self._device)

    def randn_like(self, x: Tensor, stream: str) -> Tensor:
        """Standard normals of x's shape, dtype and device; x is [B, ...]."""
        return self.randn(stream, tuple(x.shape[1:])).to(x)

    def rand(self, stream: str) -> Tensor:
        """Uniform numbers in [0, 1), [B] float32."""
        self._claim(stream)
        rows = [torch.rand((), generator=own) for own in self._rows(stream)]
        return torch.stack(rows).to(self._device)

    def shared_int(self, stream: str, high: int) -> int:
        """One integer in [0, high) for the whole global batch, the same on every rank and in every micro-batch.

        It is keyed without the sample index, so no broadcast is needed; a new micro-batch draws it again.
        """
        self._claim(stream)
        return int(torch.randint(high, (), generator=self._generator(stream, "shared")))
