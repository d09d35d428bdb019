"""How the generator makes x: the student's own sampler, run without gradient up to the step that trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion import NoiseSchedule, few_step, student_grid
from fewstep.models.denoiser import Denoiser
from fewstep.rng import Rng
from fewstep.types import Batch, Condition


class Rollout(NamedTuple):
    """x: the generator's clean sample [B, C, H, W], float32 or better.  step: the sampler's step that made it."""

    x: Tensor
    step: int


@dataclass(frozen=True)
class StudentSampler:
    """How a student makes images, in training and afterwards.

    num_steps: the steps that it is trained for.  stochastic: fresh noise between steps (DMD2), or the noise that the
    state already holds (Euler/DDIM).  shift: flow shift of the time grid.  first: the time that the first step is told,
    while its input is pure noise.  start: sigma / alpha of the first step, whose input is noise of that level and no
    data (None: pure noise).
    """

    num_steps: int = 1
    stochastic: bool = True
    shift: float = 1.0
    first: float = 1.0
    start: float | None = None

    def grid(self, schedule: NoiseSchedule, num_steps: int | None = None) -> Tensor:
        """The sampling times, [num_steps] float32 descending from noise; see `diffusion.student_grid`."""
        steps = num_steps or self.num_steps
        return student_grid(schedule, steps, shift=self.shift, first=self.first, start=self.start)

    def begin(self, eps: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The network's input at the first time, from unit noise: `schedule.prior`, or sigma eps with a `start`.

        On a VP table 2.5 gives .929 eps, not eps: a level's own noise, whose variance is 1 only together with its data.
        eps: [B, ...].  Returns its shape and dtype.
        """
        if self.start is None:
            return schedule.prior(eps)
        return schedule.at(self.grid(schedule, 1).double()).sigma.to(eps) * eps


def told(
    network: Denoiser, cond: Condition, x: Tensor, grid: Tensor, step: int, noise: Callable[[Tensor], Tensor]
) -> Condition:
    """The condition, and what else this network reads at a step of the sampler (see `Backbone.extras`).

    x: its input [B, ...].  grid: the sampler's times.  noise: draws unit noise of a tensor's shape; called if needed.
    """
    extra, wanted = {}, network.backbone.extras
    if "until" in wanted:
        until = float(grid[step + 1]) if step + 1 < len(grid) else 0.0
        extra["until"] = torch.full((len(x),), until, device=x.device)
    if "noise" in wanted:
        extra["noise"] = noise(x)
    return cond.also(**extra) if extra else cond


def backward_simulation(
    generator: Denoiser, batch: Batch, rng: Rng, sampler: StudentSampler, *, stream: str = "rollout"
) -> Rollout:
    """Run the student's sampler to one of its steps, drawn uniformly, and make x there with gradient.

    The states before that step come from the student itself, not from noised real images, so training sees what
    inference sees.  No gradient reaches them.  At the first step the input is noise alone.  The step is one for the
    whole global batch.     [DMD2, arXiv:2405.14867, section 4.5]

    stream: prefix of the random streams; a second rollout in the same turn needs another.
    """
    step, calls = rng.shared_int(f"{stream}.step", sampler.num_steps), count()
    grid = sampler.grid(generator.schedule)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        k = next(calls)
        cond = told(generator, batch.cond, x_t, grid, k, lambda x: rng.randn_like(x, f"{stream}.inner{k}"))
        with nullcontext() if k == step else torch.no_grad():
            return generator(x_t, t, cond).x0

    def draw(index: int, x0: Tensor) -> Tensor:
        return rng.randn_like(x0, f"{stream}.renoise{index}")

    noise = sampler.begin(rng.randn(f"{stream}.noise", batch.shape), generator.schedule)
    x = few_step(denoise, noise, grid[: step + 1], generator.schedule, draw=draw if sampler.stochastic else None)
    return Rollout(x, step)
