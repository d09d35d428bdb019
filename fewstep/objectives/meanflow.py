"""MeanFlow: Mean Flows for One-step Generative Modeling (arXiv:2505.13447), as a distillation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fewstep.diffusion import (
    LogitNormal,
    NoiseSchedule,
    RectifiedFlow,
    check_jvp,
    directional_derivative,
    guided,
    like,
    match,
    on_schedule,
)
from fewstep.diffusion.jvp import Function, Mode
from fewstep.models.denoiser import Denoiser
from fewstep.models.second_time import with_second_time
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.rollout import StudentSampler
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Role

FLOW = RectifiedFlow()
"""The path on which velocities are averaged; a network of another schedule is seen on it by equal noise."""

Velocity = Literal["teacher", "data"]


class Point(NamedTuple):
    """Where the identity is asked: state z at t, the path's velocity v there, the time r <= t to average to."""

    z: Tensor
    t: Tensor
    r: Tensor
    v: Tensor
    cond: Condition


@register_objective("meanflow")
@dataclass(frozen=True, kw_only=True)
class MeanFlow:
    """The student's velocity is the average over the way from t to r, so that one step of it goes all the way.

    u(z, r, t) = 1 / (t - r) int_r^t v dtau, so z_r = z - (t - r) u
    u = v - (t - r) du/dt along (dz, dr, dt) = (v, 0, 1), whose right side is the left's target     [arXiv:2505.13447]

    velocity: v is the guided teacher's at the noised data (FastGen's form), or eps - x0, the paper's, which trains
    without a teacher from where the student starts.  The network hears r through a second time that says nothing at
    first: u begins as the teacher's v, right where r = t.  It is told (t, r); the paper found (t, t - r) best.

    On a VP table the last level still holds signal, which the student's pure noise lacks: it then makes what the
    teacher's ODE makes of that noise, its mean short by alpha_T = .07 of the data's, shrunk as the ODE shrinks noise.
    """

    num_steps: int = 1  # sampling steps; training does not depend on it
    guidance: float = 3.0  # of the teacher's velocity; FastGen, Wan
    velocity: Velocity = "teacher"
    instant: float = 0.75  # share of the samples with r = t; MeanFlow section 5
    time_mean: float = -0.4  # both times are sigmoid(mean + std n); MeanFlow section 5
    time_std: float = 1.0
    power: float = 1.0  # p of the weight 1 / (|error|^2 + c)^p; MeanFlow section 5
    constant: float = 1e-3  # c; MeanFlow section 4.3, an example
    derivative: Mode = "exact"  # du/dt, see `directional_derivative`; differences: TMD and FastGen for Wan
    student_shift: float = 1.0  # flow shift of the student's time grid
    turns: Turns = Turns()  # the student alone

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}: it counts the student's sampling steps")
        check_positive(self, "guidance", "time_std", "constant", "student_shift")
        if not 0 <= self.instant < 1:
            raise ValueError(f"instant must be in [0, 1), got {self.instant}: at 1 no average would ever be learnt")
        if not 0 <= self.power < float("inf"):
            raise ValueError(f"power must be a finite number >= 0, got {self.power}")
        for name, allowed in (("velocity", get_args(Velocity)), ("derivative", get_args(Mode))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"no {name} {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.velocity == "data" and self.guidance != 1:
            raise ValueError(f"velocity 'data' asks no teacher, so guidance {self.guidance} has no effect; give 1")
        self.sampler.grid(FLOW)  # raises for steps that make no descending grid

    @property
    def roles(self) -> frozenset[Role]:
        """None."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """Real latents, to be noised, and derivatives of the student."""
        return frozenset({"latents", "jvp"})

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: x0 = z - t u, then back along u to the next time, r."""
        return StudentSampler(self.num_steps, stochastic=False, shift=self.student_shift)

    def student(self, make: Callable[[], Denoiser], seed: int) -> Denoiser:
        """The start network, told the time to which it averages."""
        return with_second_time(make(), seed)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend w |u - stopgrad(v - (t - r) du/dt)|^2,  w = stopgrad (|.|^2 + c)^-p,  |.|^2 summed over a sample."""
        z, t, r, v, cond = self.point(trio, batch, rng)
        u, du = directional_derivative(
            average_velocity(trio.generator, r, cond),
            (z, t),
            (v, torch.ones_like(t)),
            mode=self.derivative,
            bounds=ends(trio.generator.schedule),
            graph=True,
        )
        error = (u - (v - like(t - r, z) * du)).square().flatten(1).sum(1)
        total = ((error.detach() + self.constant) ** -self.power * error).mean()
        size = z[0].numel()
        metrics = {"meanflow": total, "meanflow/mse": error.mean() / size, "meanflow/du_rms": du.square().mean().sqrt()}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """There is no critic, and the trainer gives it no turn."""
        raise NotImplementedError("MeanFlow trains the student alone")

    def probe(self, trio: Trio, batch: Batch, rng: Rng) -> None:
        """Raises RuntimeError if the derivative that the loss takes is lost or wrong."""
        z, t, r, v, cond = self.point(trio, batch, rng)
        check_jvp(
            average_velocity(trio.generator, r, cond),
            (z, t),
            (v, torch.ones_like(t)),
            names=("the state", "the time"),
            mode=self.derivative,
            bounds=ends(trio.generator.schedule),
        )

    @torch.no_grad()
    def point(self, trio: Trio, batch: Batch, rng: Rng) -> Point:
        """Noised data, the velocity there, and a time to average to."""
        if batch.real is None:
            raise ValueError("MeanFlow noises real latents, and this batch has none; see `needs`")
        x0, cond = batch.real
        t, r = self.times(rng, trio.generator.schedule, x0.device)
        eps = rng.randn_like(x0, "meanflow.eps")
        z = FLOW.add_noise(x0, eps, t)
        if self.velocity == "data":
            return Point(z, t, r, eps - x0, cond)
        teacher = on_schedule(guided(trio.real_score, self.guidance), trio.real_score.schedule, FLOW)
        return Point(z, t, r, teacher(z, t, cond).flow, cond)

    def times(self, rng: Rng, schedule: NoiseSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
        """t, r <= t: [B] float32.  Two draws in order, or r = t; t is one that `schedule` has, r that or 0.

        What lies below the schedule's cleanest level is told as that level, which must then mean one thing: data.
        """
        law, (low, high) = LogitNormal(self.time_mean, self.time_std), ends(schedule)
        a, b = (law.sample(rng, f"meanflow.{name}", device).clamp(low, high) for name in ("t", "r"))
        t, r = torch.maximum(a, b), torch.minimum(a, b)
        r = torch.where(r > low, r, 0.0)
        return t, torch.where(rng.rand("meanflow.instant").to(r) < self.instant, t, r)


def average_velocity(generator: Denoiser, r: Tensor, cond: Condition) -> Function:
    """u(z, t), the student's average velocity from t down to r on `FLOW`; what its few steps go along.

    x0 = z - t u and eps = z + (1 - t) u, so the deterministic sampler's next state (1 - r) x0 + r eps is z - (t - r) u
    (DERIVED).  On another schedule its states and times are these by equal noise, and so is the time r that it is told.

    z: [B, C, H, W].  t, r: [B] of `FLOW`.
    """
    network = on_schedule(generator, generator.schedule, FLOW)
    cond = cond.also(until=match(r, FLOW, generator.schedule)[0])
    return lambda z, t: network(z, t, cond).flow


def ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """The times of `FLOW` that have a level on `schedule`, data excluded.

    A hair inside: at the very ends the time that the network is told stops moving, and its derivative would be lost.
    """
    low, high = match(torch.tensor([0.0, 1.0], dtype=torch.float64), schedule, FLOW)[0].tolist()
    return max(low, 1e-3) + 1e-6, high - 1e-6
