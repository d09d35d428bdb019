"""Which prompts a step works on: a pure function of the global sample index, so there is no position to lose."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch

from fewstep.rng import key
from fewstep.sampling import Advance
from fewstep.teachers.base import PromptEncoder
from fewstep.training.reals import RealData
from fewstep.types import Batch, Condition


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """One prompt a line, UTF-8; blank lines are skipped.

    Raises FileNotFoundError if there is no such file and ValueError if it holds no prompt or is no text.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file at {path}; it holds one prompt per line, UTF-8")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


PIECE = 16
"""Prompts encoded between two words of progress."""


class PromptData:
    """Encoded prompts, shuffled anew each epoch.

    Sample i of the run gets prompt permutation(seed, i // N)[i % N]: every prompt once per epoch, the same on any
    number of processes.  Encoded once and kept; the encoders are free afterwards.
    reals: real samples that come with each batch, under captions of their own.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: PromptEncoder,
        shape: tuple[int, ...],
        seed: int,
        progress: Advance | None = None,
        reals: RealData | None = None,
    ) -> None:
        self.prompts = tuple(prompts)
        self.reals = reals
        self.shape = shape
        self.seed = seed
        digest = sha256("\n".join(self.prompts).encode())  # prompts hold no line ends
        if reals is not None:
            digest.update(reals.digest.encode())
        self.digest = digest.hexdigest()
        self._conditions = _encoded(self.prompts, encode, progress)
        bad = [k for k, v in self._conditions.tensors.items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ValueError(
                f"the text encoder gave non-finite values in {bad}; its weights are damaged or overflow in this dtype"
            )
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def _permutation(self, epoch: int) -> torch.Tensor:
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
        real = self.reals.batch(sample_ids, device) if self.reals is not None else None
        return Batch(Condition(tensors, self._conditions.null).to(device), self.shape, tuple(sample_ids), real)


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
