"""Which prompts a step works on: a pure function of the global sample index, so there is no position to lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from fewstep.config import RunConfig
from fewstep.teachers.base import Teacher
from fewstep.training import parallel
from fewstep.training.cache import Share
from fewstep.training.embeddings import Encoder, StoredConditions, card_of, note_of
from fewstep.training.latents import card_of as codec_card_of
from fewstep.training.latents import encoded
from fewstep.training.order import Order
from fewstep.training.pairs import PairData
from fewstep.training.prompts import text_blocks
from fewstep.training.reals import RealData
from fewstep.types import Batch, Condition


class PromptData:
    """Encoded prompts, shuffled anew each epoch.

    Sample i of the run gets prompt permutation(seed, i // N)[i % N]: every prompt once per epoch, the same on any
    number of processes.  Encoded once; the encoders are free afterwards.
    encode: a prompt encoder, or an `Encoder`, whose conditions of many prompts stay on the disk, as the prompts may.
    reals, pairs: real samples, and pairs of the teacher's ODE, that come with each batch, under captions of their own.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Callable[[Sequence[str]], Condition | StoredConditions],
        shape: tuple[int, ...],
        seed: int,
        reals: RealData | None = None,
        pairs: PairData | None = None,
    ) -> None:
        self.prompts = prompts
        self.reals, self.pairs = reals, pairs
        self.shape = shape
        self.order = Order("prompts", seed, len(prompts))
        digest = sha256()
        for block in text_blocks(prompts):
            digest.update(block)
        for more in (reals, pairs):
            if more is not None:
                digest.update(more.digest.encode())
        self.digest = digest.hexdigest()
        self._conditions = encode(prompts)

    def batch(self, sample_ids: Sequence[int], device: torch.device | str = "cpu") -> Batch:
        """The micro-batch of these global sample indices."""
        rows = self.order.rows(sample_ids)
        cond = self._conditions[rows].to(device)
        real = self.reals.batch(sample_ids, device) if self.reals is not None else None
        pair = self.pairs.batch(sample_ids, device) if self.pairs is not None else None
        prompts = tuple(self.prompts[int(row)] for row in rows.tolist())
        return Batch(cond, self.shape, tuple(sample_ids), real, pair, prompts)


def load_data(
    config: RunConfig,
    teacher: Teacher,
    prompts: Sequence[str],
    captions: Sequence[str] | None,
    accelerator: Accelerator,
    console: Console,
) -> PromptData:
    """Prompts, and the real samples and pairs that the method asks for; encoded, each process its share.

    captions: of the pictures that the configuration names, if it does; else the teacher brings real samples.
    """
    train, note = config.train, note_of(teacher)
    together = partial(parallel.failing_together, "encoding", accelerator)
    share = Share(accelerator.process_index, accelerator.num_processes, together)
    encode = Encoder(
        teacher.encode,
        card_of(teacher, prompts, config.negative_prompt),
        note=note,
        where=train.prompt_cache,
        console=console,
        share=share,
    )
    found = None
    if "latents" in config.objective.needs and captions is not None:
        path, codec, place = Path(str(config.data)), codec_card_of(teacher), accelerator.device
        more: Any = {"note": note, "console": console, "share": share, "device": place}
        found = encoded(path, captions, teacher.codec, teacher.shape, codec, **more)
    elif "latents" in config.objective.needs:
        assert teacher.reals is not None  # check_needs
        found = teacher.reals()
    with teacher.encoding_on(accelerator.device):
        reals = RealData(found, encode, train.seed) if found is not None else None
        pairs = PairData(Path(config.pairs), encode, train.seed) if config.pairs else None
        return PromptData(prompts, encode, teacher.shape, train.seed, reals, pairs)
