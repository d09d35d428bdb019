"""In-training evaluation: a grid of student beside teacher from the same noise, and a cheap running figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from torch import Tensor

from fewstep import pictures
from fewstep.bar import bar
from fewstep.models.denoiser import Denoiser
from fewstep.objectives.rollout import StudentSampler
from fewstep.processes import ALONE, Processes
from fewstep.sampling import Advance, Student, at_a_time, cycled, sample_teacher
from fewstep.teachers.base import Teacher

PREVIEW_SEED = 1_000_003
"""Seed of preview and running figure; final evaluations use others, so the best checkpoint is not chosen on them."""


LATENTS = 2**20
"""Numbers that a grid's samples have at the most, but for two that there always are: 16 of SDXL."""


@dataclass
class Preview:
    """The trainer's monitor.

    processes: which make the images together, each its share; the main one keeps the pictures and has the figures.
    samples: images behind the running figure, which is labelled with their number ("fmd@1000") because a Frechet
    distance from so few samples is higher than the final one.

    The grid has four images of each of up to ten prompts, fewer of large ones: the teacher makes each in 50 steps.
    """

    teacher: Teacher
    out: Path
    sampler: StudentSampler
    samples: int = 1000
    teacher_steps: int = 50
    console: Console | None = None
    processes: Processes = ALONE
    _teacher_panel: Tensor | None = field(default=None, repr=False)

    def evaluate(self, student: Denoiser, iteration: int) -> dict[str, float]:
        """Write <out>/previews/<iteration>.png and give the running figures; "rank" orders checkpoints.

        Neither on processes other than the main one.
        """
        maker = Student(student, self.teacher, self.sampler)
        prompts, per_prompt = self._grid()
        rows = [p for p in prompts for _ in range(per_prompt)]
        count = len(rows) if len(self.teacher.shape) >= 3 else 1000
        total = self._own(count) * (1 + (self._teacher_panel is None))
        total += self._own(self.samples) if self.teacher.evaluation else 0
        what = f"iteration {iteration}: images for the preview and its figure"
        with bar(what, total, self.console, lines=True) as done:
            if self._teacher_panel is None:
                of_teacher = partial(sample_teacher, self.teacher, num_steps=self.teacher_steps)
                self._teacher_panel = self._made(of_teacher, count, rows, PREVIEW_SEED, done)
            steps = f"{self.sampler.num_steps} step{'s' * (self.sampler.num_steps > 1)}"
            panels = [
                (f"teacher, {self.teacher_steps} steps", self._teacher_panel),
                (f"student, {steps}", self._made(maker.sample, count, rows, PREVIEW_SEED, done)),
            ]
            judged = self._judged(maker, done)
        if not self.processes.main:
            return {}
        # No network is called from here on: an error of one process would leave the others waiting in theirs.
        pictures.save(titled_grid(panels, prompts, per_prompt), self.out / "previews" / f"{iteration:08d}.png")
        return self._figures(judged)

    def prompts(self) -> list[str]:
        """All that it ever encodes."""
        judged = [] if self.teacher.evaluation is None else cycled(self.teacher.prompts, 0, self.samples)
        return list(dict.fromkeys([*self._grid()[0], *judged]))

    def _grid(self) -> tuple[list[str], int]:
        """The grid's prompts, and how many images of each."""
        most = LATENTS // math.prod(self.teacher.shape)
        prompts = grid_prompts(self.teacher.prompts, max(2, min(10, most)))
        return prompts, max(1, min(4, most // len(prompts)))

    def _judged(self, maker: Student, progress: Advance) -> Tensor | None:
        """The images behind the figures, if there are any."""
        if self.teacher.evaluation is None:
            return None
        return self._made(maker.sample, self.samples, self.teacher.prompts, PREVIEW_SEED + 10_000, progress)

    def _made(
        self, make: Callable[..., Tensor], n: int, prompts: Sequence[str], seed: int, progress: Advance
    ) -> Tensor:
        """n images of all processes, whole on the main one.  All call a network as often, as one in parts needs."""
        batch = at_a_time(self.teacher.shape)

        def own(share: range) -> tuple[Tensor]:
            asked = cycled(prompts, share.start, share.stop)
            return (make(len(share), asked, seed + share.start, batch_size=batch, progress=progress),)

        return self.processes.gather(n, batch, own)[0]

    def _own(self, n: int) -> int:
        """How many of n images this process makes."""
        return len(self.processes.share(n, at_a_time(self.teacher.shape)))

    def _figures(self, images: Tensor | None) -> dict[str, float]:
        judge = self.teacher.evaluation
        if judge is None or images is None:
            return {}
        figures = judge.measure(images, cycled(self.teacher.prompts, 0, self.samples))
        ranked = {judge.metric: figures[judge.metric]} | figures  # first: who reads the log takes the first for it
        named = {f"{name}@{self.samples}": value for name, value in ranked.items()}
        return named | {"rank": figures[judge.metric]}


def grid_prompts(prompts: Sequence[str], limit: int = 10) -> list[str]:
    """Up to `limit` of the teacher's prompts, the rows of a grid."""
    found: dict[str, None] = {}
    for prompt in prompts:  # of millions, only the first few are looked at
        found[prompt] = None
        if len(found) == limit:
            break
    return list(found)


def titled_grid(panels: Sequence[tuple[str, Tensor]], prompts: Sequence[str], per_prompt: int) -> Image.Image:
    """Panels of images (rows = prompts) or points on one scale, side by side with titles."""
    extent = max(float(images.abs().max()) for _, images in panels) * 1.05 if panels[0][1].ndim < 4 else None
    made = [(name, pictures.panel(images, per_prompt, extent=extent)) for name, images in panels]
    return pictures.side_by_side(made, list(prompts) if extent is None else ())
