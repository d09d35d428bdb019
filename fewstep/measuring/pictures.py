"""Where pictures come from, a batch at a time, and what is seen in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from fewstep.bar import bar
from fewstep.metrics.extractors import Extractor
from fewstep.metrics.features import quantise
from fewstep.metrics.image_folder import batches, prepared_tensor
from fewstep.metrics.look import Scorer, Seen, look
from fewstep.metrics.protocols import Protocol
from fewstep.processes import Processes
from fewstep.sampling import Student, cycled

BATCH = 50
"""Pictures that the extractor sees at a time, and that a process makes or reads at least."""
Pictures = Callable[[range], Iterator[tuple[Tensor, ...]]]
"""Of a range of indices, a batch at a time: [B, C, H, W] uint8, twice where a CLIP is shown them otherwise."""


def of_files(files: Sequence[Path], views: Sequence[Protocol], channels: int) -> Pictures:
    """Each view reads the files by itself; there are two only where a CLIP is shown another size."""

    def pictures(own: range) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(batches(files[own.start : own.stop], view, channels, BATCH) for view in views))

    return pictures


def samples_of(
    student: Student,
    views: Sequence[Protocol],
    channels: int,
    prompts: Sequence[str],
    firsts: range,
    batch_size: int | None,
) -> Iterator[tuple[dict[str, Any], Pictures, Sequence[str]]]:
    """Sets of a student's samples, one for each first seed: what they are, the pictures, their prompts."""
    n = firsts.step
    texts = cycled(prompts or student.teacher.prompts, 0, n)

    def pictures(seed: int, own: range) -> Iterator[tuple[Tensor, ...]]:
        """A batch at a time: 30,000 of 1024 pixels would fit no memory."""
        for start in own[::BATCH]:
            prompts = texts[start : min(start + BATCH, own.stop)]
            images = quantise(student.sample(len(prompts), prompts, seed + start, batch_size=batch_size))
            yield tuple(prepared_tensor(images, view, channels) for view in views)

    told = {"iteration": student.iteration, "steps": student.sampler.num_steps}
    for seed in firsts:
        yield told | {"seed": seed}, partial(pictures, seed), texts


def seen_by(
    extractor: Extractor,
    n: int,
    pictures: Pictures,
    processes: Processes,
    console: Console | None,
    what: str,
    scorer: Scorer | None = None,
    prompts: Sequence[str] = (),
) -> Seen:
    """What all processes saw in n pictures, in order, on the main one."""

    def own_rows(own: range) -> tuple[Tensor, ...]:
        with bar(what, len(own), console) as done:
            seen = look(extractor, pictures(own), scorer=scorer, prompts=prompts[own.start : own.stop], advance=done)
        return (seen.features,) if seen.cosines is None else (seen.features, seen.cosines)

    return Seen(*processes.gather(n, BATCH, own_rows))
