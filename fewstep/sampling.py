"""Making images: the student in its few steps, the teacher in its many, both from the noise of numbered images.

Image i of a call with seed s draws from its own generator on the CPU, seeded s + i, first its latents and then its step
noise, as a diffusers pipeline does.  So a picture's noise depends on neither device, batch size nor count, and a
picture can be made again by its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from fewstep.diffusion import few_step, ode
from fewstep.models.denoiser import Denoiser
from fewstep.models.patches import pack, unpack
from fewstep.objectives.rollout import StudentSampler, told
from fewstep.teachers.base import Teacher
from fewstep.types import Condition

Advance = Callable[[int], None]
"""Called with the number of images finished since the last call."""


LATENTS = 2**16
"""Numbers in a batch of samples by default: one picture of SDXL, four of Stable Diffusion."""


class NotFinite(ValueError):
    """A network gave samples that hold NaN or infinity."""


@dataclass(frozen=True)
class Student:
    """A distilled generator with all it needs to make images.

    sampler: the sampling steps that it was trained for and how it goes from one to the next.
    iteration: that of the checkpoint that it comes from, if it comes from one.
    """

    denoiser: Denoiser
    teacher: Teacher
    sampler: StudentSampler
    iteration: int | None = None

    def sample(
        self,
        n: int,
        prompts: Sequence[str] | None = None,
        seed: int = 0,
        num_steps: int | None = None,
        *,
        batch_size: int | None = None,
        progress: Advance | None = None,
    ) -> Tensor:
        """n images [n, C, H, W] float32 in [-1, 1], on the CPU.

        prompts: image i gets prompts[i % len]; the teacher's own by default.  batch_size: made at a time, by default
        what `at_a_time` says.
        Raises ValueError for n, num_steps or batch_size < 1, NotFinite for samples that are not finite.
        """
        check_count("num_steps", self.sampler.num_steps if num_steps is None else num_steps)
        schedule, stochastic = self.denoiser.schedule, self.sampler.stochastic
        grid = self.sampler.grid(schedule, num_steps)
        packed = self.teacher.few_steps is not None and self.teacher.few_steps.packed

        def run(eps: Tensor, generators: list[torch.Generator], cond: Condition) -> Tensor:
            calls = count()

            def fresh(x: Tensor) -> Tensor:
                if packed:  # in the order in which the exported pipeline draws it
                    return unpack(numbered_noise(tuple(pack(x).shape[1:]), generators), x.shape[-2:]).to(x)
                return numbered_noise(tuple(x.shape[1:]), generators).to(x)

            def denoise(x_t: Tensor, t: Tensor) -> Tensor:
                return self.denoiser(x_t, t, told(self.denoiser, cond, x_t, grid, next(calls), fresh)).x0

            noise = self.sampler.begin(eps, schedule)
            return few_step(denoise, noise, grid, schedule, draw=(lambda _k, x: fresh(x)) if stochastic else None)

        return _batched(self.teacher, self.denoiser, run, n, prompts, seed, batch_size, progress)


def sample_teacher(
    teacher: Teacher,
    n: int,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    *,
    num_steps: int = 50,
    guidance: float | None = None,
    batch_size: int | None = None,
    progress: Advance | None = None,
) -> Tensor:
    """n images of the teacher, as its pipeline makes them: [n, C, H, W] float32 in [-1, 1], on the CPU.

    guidance: classifier-free guidance scale, the teacher's own by default.  batch_size: as in `Student.sample`.
    """
    check_count("num_steps", num_steps)
    grid, scale = teacher.grid(num_steps), teacher.guidance if guidance is None else guidance

    def run(eps: Tensor, _generators: list[torch.Generator], cond: Condition) -> Tensor:
        noise = teacher.denoiser.schedule.prior(eps)
        return ode(teacher.denoiser, noise, grid, cond, method=teacher.solver, guidance=scale)

    return _batched(teacher, teacher.denoiser, run, n, prompts, seed, batch_size, progress)


def numbered_noise(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Standard normals [len(generators), *shape] float32, row i from generator i."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators])


def at_a_time(shape: Sequence[int]) -> int:
    """How many samples of this shape are made at a time by default."""
    return max(1, min(250, LATENTS // math.prod(shape)))


def cycled(prompts: Sequence[str], start: int, stop: int) -> list[str]:
    """The prompts of images start..stop-1: image i gets prompts[i % len]."""
    return [prompts[i % len(prompts)] for i in range(start, stop)]


def check_count(name: str, value: int) -> None:
    """Raises ValueError unless value >= 1."""
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


@torch.no_grad()
def _batched(
    teacher: Teacher,
    denoiser: Denoiser,
    run: Callable[[Tensor, list[torch.Generator], Condition], Tensor],
    n: int,
    prompts: Sequence[str] | None,
    seed: int,
    batch_size: int | None,
    progress: Advance | None,
) -> Tensor:
    check_count("n", n)
    batch_size = at_a_time(teacher.shape) if batch_size is None else batch_size
    check_count("batch_size", batch_size)
    prompts = teacher.prompts if prompts is None else prompts
    if isinstance(prompts, str) or not prompts:  # a string is a sequence too: of its letters
        raise ValueError(
            f"prompts must be a list of one prompt or more, or None for the teacher's own, if any; got {prompts!r}"
        )
    # Buffers too: a closed-form teacher is a formula without a parameter.
    device = next((p.device for p in chain(denoiser.parameters(), denoiser.buffers())), torch.device("cpu"))
    images = []
    for start, stop in _slices(n, batch_size):
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(start, stop)]
        eps = numbered_noise(teacher.shape, generators).to(device)
        cond = teacher.encode(cycled(prompts, start, stop)).to(device)
        images.append(teacher.codec.decode(_finite(run(eps, generators, cond))).float().cpu())
        if progress is not None:
            progress(stop - start)
    return torch.cat(images)


def _finite(x: Tensor) -> Tensor:
    if not x.isfinite().all():
        raise NotFinite("the network gave samples that are not finite: it has diverged, or its file is damaged")
    return x


def _slices(n: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, n, size):
        yield start, min(start + size, n)
