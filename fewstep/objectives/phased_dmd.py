"""Phased DMD: distribution matching in sub-intervals of noise, one expert each (arXiv:2510.27684)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion import Interval, Law, NoiseSchedule, RectifiedFlow, guided
from fewstep.models.denoiser import Denoiser
from fewstep.models.experts import Experts
from fewstep.models.trio import Trio
from fewstep.objectives.base import Stage, Turns, check_positive, register_objective
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import StudentSampler, told
from fewstep.objectives.terms import distribution_matching, interval_denoising, interval_matching
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role


class Reached(NamedTuple):
    """Where a rollout ends: the state x_s [B, ...] at time s [B], and the clean sample x0 that its step saw there.

    In the last phase s is None and the state is x0.
    """

    state: Tensor
    x0: Tensor
    s: Tensor | None


@register_objective("phased_dmd")
@dataclass(frozen=True, kw_only=True)
class PhasedDMD:
    """The student's steps are shared out among experts, trained one after the other from noise to data.

    An expert's phase ends at the time s of the next expert's first step.  Its x_s is matched to the teacher's at levels
    above s, up to pure noise; clean samples do not exist before the last phase.  The fake score is the teacher again
    in each phase, and its target is corrected for x_s's own noise.  Earlier experts are frozen.  With one phase it is
    DMD2 with deterministic steps and no GAN.  Data-free.
    Of T(t_k, 1), the paper's law of t, its normaliser and its guidance nothing was found; they are DMD2's here.
    """

    num_steps: int = 4  # sampling steps of the student; section 2.2
    phases: int = 2  # experts, which share the steps: 2 + 2; section 2.2
    phase: int = 0  # whose losses these are; a run goes through all of them by itself
    guidance: float = 1.75  # classifier-free guidance of the real score; DMD2 table 6
    turns: Turns = Turns(critic_per_generator=5)  # the paper's settings of all runs
    student_shift: float = 1.0  # flow shift of the student's time grid; the paper: 5 for Wan, 3 for Qwen-Image
    min_index: int = 20  # re-noising of the matching term: t = s + (1 - s) i / 999, i uniform; DMD's for s = 0
    max_index: int = 980
    shift: float = 1.0  # flow shift of i / 999
    normalise: bool = True  # by DMD's per-sample normaliser, at x0; false: the paper's eq. 10, at x_s
    cap: float = 10.0  # greatest weight 1 / sigma_ts^2 of the fake score's regression; eq. 13
    floor: float = 1e-5  # least normaliser; ours

    def __post_init__(self) -> None:
        if self.num_steps < 1 or not 1 <= self.phases <= self.num_steps:
            raise ValueError(
                f"phases = {self.phases} must be 1 or more and at most num_steps = {self.num_steps}, as each expert "
                "makes a step or more; for one step use method dmd2"
            )
        if not 0 <= self.phase < self.phases:
            raise ValueError(f"phase must be in 0..{self.phases - 1}, got {self.phase}; leave it out to train all")
        index_law(self.min_index, self.max_index)  # raises for indices that are no interval of 0..999
        check_positive(self, "guidance", "student_shift", "shift", "cap", "floor")
        self.sampler.grid(RectifiedFlow())  # raises for steps that make no descending grid

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score."""
        return frozenset({"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """A stage for each phase, of equal length."""
        return tuple(Stage(replace(self, phase=k), 1.0) for k in range(self.phases))

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: by Euler's deterministic steps."""
        return StudentSampler(self.num_steps, stochastic=False, shift=self.student_shift)

    @property
    def ends(self) -> tuple[int, ...]:
        """The step at which each phase ends: that of the next expert's first; equal numbers but for rounding."""
        return tuple(round(self.num_steps * (k + 1) / self.phases) for k in range(self.phases))

    def student(self, make: Callable[[], Denoiser], seed: int) -> Denoiser:
        """Experts, each a copy of the start network, limited half-way between neighbouring steps."""
        copies = [make() for _ in range(self.phases)]
        grid = self.sampler.grid(copies[0].schedule).double()
        return Experts(copies, [float(grid[end - 1] + grid[end]) / 2 for end in self.ends[:-1]])

    def begin(self, trio: Trio) -> None:
        """Let the phase's expert train, alone."""
        experts_of(trio).activate(self.phase)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the reverse KL between the student's and the teacher's states, diffused further from s."""
        reached = self.rollout(trio, batch, rng)
        schedule = trio.real_score.schedule
        with torch.no_grad():
            t = self.law(schedule, self.min_index, self.max_index).sample(rng, "matching.t", reached.x0.device)
            x_t = self.renoised(trio, reached, rng.randn_like(reached.x0, "matching.eps"), t)
            real = guided(trio.real_score, self.guidance)(x_t, t, batch.cond).x0
            fake = trio.critic()(x_t, t, batch.cond).x0
        if self.normalise:
            total, weight = distribution_matching(reached.x0, real, fake, floor=self.floor)
        else:
            total, weight = interval_matching(reached.state, real, fake, reached.s, t, schedule)
        gap = (fake - real).square().mean().sqrt()
        metrics = {"dm": total.detach(), "dm/gap_rms": gap, "dm/weight": weight.mean(), **moments(reached.state)}
        return Loss(total, metrics)

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Keep the fake score on the distribution of the student's states."""
        with torch.no_grad():
            state, _, s = self.rollout(trio, batch, rng)
        law = self.law(trio.critic().schedule, 0, 999)
        if s is None:
            return fit_fake_score(trio, state, batch.cond, law, rng)
        with torch.no_grad():
            t = law.sample(rng, "critic.t", state.device)
            eps = rng.randn_like(state, "critic.eps")
            x_t = trio.critic().schedule.renoise(state, eps, s, t)
        loss = interval_denoising(trio.critic()(x_t, t, batch.cond), state, eps, s, cap=self.cap)
        return Loss(loss, {"critic": loss.detach()})

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Reached:
        """Run the student to a step of this phase, drawn uniformly, and go from there straight to the phase's end.

        Gradient flows through that step alone     [section 2.2: stochastic gradient truncation within the phase]
        """
        generator, grid = trio.generator, self.sampler.grid(trio.generator.schedule)
        start, end = (0, *self.ends)[self.phase], self.ends[self.phase]
        last = start + rng.shared_int("rollout.step", end - start)
        x = self.sampler.begin(rng.randn("rollout.noise", batch.shape), generator.schedule)

        def step(x: Tensor, k: int, to: int) -> Reached:
            def noise(x: Tensor) -> Tensor:
                return rng.randn_like(x, f"rollout.inner{k}")

            t = grid[k].to(x.device).repeat(len(x))
            here = generator(x, t, told(generator, batch.cond, x, grid, k, noise))
            if to == len(grid):
                return Reached(here.x0, here.x0, None)
            s = grid[to].to(x.device).repeat(len(x))
            return Reached(generator.schedule.add_noise(here.x0, here.eps, s), here.x0, s)

        with torch.no_grad():
            for k, following in pairwise(range(last + 1)):
                x = step(x, k, following).state
        return step(x, last, end)

    def renoised(self, trio: Trio, reached: Reached, eps: Tensor, t: Tensor) -> Tensor:
        """The state carried on to time t."""
        schedule = trio.real_score.schedule
        if reached.s is None:
            return schedule.add_noise(reached.state, eps, t)
        return schedule.renoise(reached.state, eps, reached.s, t)

    def law(self, schedule: NoiseSchedule, low: int, high: int) -> Law:
        """Where this phase's states are re-noised to: DMD2's law, in all but the last squeezed into [s, 1]."""
        law, grid, end = index_law(low, high, self.shift), self.sampler.grid(schedule), self.ends[self.phase]
        return law if end == len(grid) else Interval(law, low=float(grid[end]))


def experts_of(trio: Trio) -> Experts:
    """The student.  Raises TypeError if this trio's is one network."""
    if not isinstance(trio.generator, Experts):
        raise TypeError("the student must be `Experts`; build the trio with the method's own `student`")
    return trio.generator
