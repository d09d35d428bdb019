"""BOOT: Data-free Distillation of Denoising Diffusion Models with Bootstrapping (arXiv:2306.05544)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.diffusion import NoiseSchedule, RectifiedFlow, guided, like, on_schedule
from fewstep.models.denoiser import Denoiser
from fewstep.models.second_time import with_second_time
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.renoise import moments
from fewstep.objectives.rollout import StudentSampler
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Role

FLOW = RectifiedFlow()
"""The trajectory's clock, whatever the teacher's schedule: it reaches pure noise and data.  A VP table does not: at its
first level, sigma .029, the signal of a Gaussian of spread .5 is still 5% short of the sample."""

Solver = Literal["ddim", "heun"]


@register_objective("boot")
@dataclass(frozen=True, kw_only=True)
class BOOT:
    """The student reads noise and a time, and says what of the teacher's ODE state at that time is signal.

    y(e, t) = (x_t - sigma e) / alpha on the trajectory from x_1 = e.  Its own y at t, carried to s < t by one step of
    the teacher, is the target of its y at s; at t = 1 that is the teacher's x0 of pure noise, and at s = 0 the sample.
    Data-free, no fake score, one step only.

    The network stays told that its input is pure noise; s enters through a second time, which says nothing at first:
    y(e, .) begins as the teacher's x0(e, 1) (DERIVED; how the paper embeds times was NOT FOUND).
    On VP an eps network's y at index 999 is its error times 14.6; `first_time` 0.4 makes that .85, as in DMD2.
    """

    num_steps: int = 1  # the student reads nothing but noise, so there is no second step
    guidance: float = 3.0  # of the teacher, at both ends; ours, the paper's was NOT FOUND
    step: float = 0.05  # t - s, of rectified flow's time; OFTSR's for its BOOT, the paper's was NOT FOUND
    solver: Solver = "heun"  # ddim: one teacher call fewer, an error of first order in `step`; OFTSR: second order
    ends: float = 0.125  # share of the samples at s = 1 (the boundary loss), and as many at 0, which is sampled; ours
    power: float = 0.0  # squared residuals are divided by (1 - r)^power; ours: 2 starves s = 0, whose 1 - r is 1
    floor: float = 1e-2  # of 1 - r there; ours
    first_time: float = 1.0  # told to the student with every noise; DMD2 F.4 for eps networks: 0.4
    turns: Turns = Turns()  # the student alone

    def __post_init__(self) -> None:
        if self.num_steps != 1:
            raise ValueError(f"num_steps must be 1, got {self.num_steps}: for more steps take --method dmd2 or sid")
        check_positive(self, "guidance", "floor", "first_time")
        if not 0 < self.step < 1:
            raise ValueError(f"step must be in (0, 1), got {self.step}: it is how far one bootstrap goes in time")
        if not 0 <= self.ends < 0.5:
            raise ValueError(f"ends must be in [0, 0.5), got {self.ends}: it is a share of the samples, taken twice")
        if not 0 <= self.power <= 2:
            raise ValueError(f"power must be in [0, 2], got {self.power}: 2 turns residuals into the teacher's x0")
        if self.solver not in get_args(Solver):
            raise ValueError(f"no solver {self.solver!r}; allowed: {', '.join(get_args(Solver))}")
        self.sampler.grid(FLOW)  # raises for a first time above 1

    @property
    def roles(self) -> frozenset[Role]:
        """None."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: in one step, its signal at t = 0."""
        return StudentSampler(first=self.first_time)

    def student(self, make: Callable[[], Denoiser], seed: int) -> Denoiser:
        """The start network, told the time of the wanted signal."""
        return with_second_time(make(), seed)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend mean |y(e, s) - Y|^2, Y the teacher's step from the student's own y(e, t), without graph.

        The paper's bootstrapping and boundary losses in one: at s = t = 1 all of Y is the teacher's x0 of e.
        The paper's weight w_t / (t - s)^2 is a constant for a constant w_t; what w_t is was NOT FOUND.
        """
        e = rng.randn("boot.noise", batch.shape)
        s, t = self.times(rng)
        teacher = on_schedule(guided(trio.real_score, self.guidance), trio.real_score.schedule, FLOW)
        with torch.no_grad():
            y_t = self.signal(trio.generator, e, t, batch.cond)
            target = signal_step(
                lambda x, time: teacher(x, time, batch.cond).x0, y_t, e, s, t, FLOW, solver=self.solver
            )
        y_s = self.signal(trio.generator, e, s, batch.cond)
        error = (y_s - target).square().flatten(1).mean(1)
        total = (error / teacher_share(s, t, FLOW).clamp_min(self.floor).pow(self.power).to(error)).mean()
        return Loss(total, {"boot": total.detach(), "boot/residual": error.detach().mean(), **moments(y_s)})

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """There is no critic, and the trainer gives it no turn."""
        raise NotImplementedError("BOOT trains the student alone")

    def times(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """Where to: s uniform on [0, 1], its ends with a share each.  Where from: t = min(s + step, 1).  Each [B].

        Drawn the other way round (t first, s = t - step) the last step below noise would have no target, and no chain
        of bootstraps an anchor (DERIVED).
        """
        s = ((rng.rand("boot.s") - self.ends) / (1 - 2 * self.ends)).clamp(0, 1)
        return s, (s + self.step).clamp_max(1)

    def signal(self, generator: Denoiser, e: Tensor, time: Tensor, cond: Condition) -> Tensor:
        """y(e, time), float32 or better.  e: unit noise [B, C, H, W].  time: [B] of `FLOW`."""
        told = torch.full_like(time, float(self.sampler.grid(generator.schedule)[0]))
        noise = self.sampler.begin(e, generator.schedule)
        return generator(noise, told, cond.also(until=time)).x0


def teacher_share(s: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """1 - r, r = (sigma_s alpha_t) / (sigma_t alpha_s): how far a step from t to s moves towards the denoiser's x0.

    It is the whole way (1) from pure noise, s = t included, and onto data; 0 for no step elsewhere.
    s <= t: [B] of `schedule`.  Returns [B] float64 in [0, 1].
    """
    # Not 1 - r: neighbouring times leave few digits of the difference.
    rate = 0.5 * (schedule.at(t.double()).log_snr - schedule.at(s.double()).log_snr)
    return torch.where(schedule.at(t.double()).alpha == 0, 1.0, -torch.expm1(rate))


def signal_step(
    denoise: Callable[[Tensor, Tensor], Tensor],
    y_t: Tensor,
    e: Tensor,
    s: Tensor,
    t: Tensor,
    schedule: NoiseSchedule,
    *,
    solver: Solver = "ddim",
) -> Tensor:
    """One step of the Signal-ODE, which is DDIM seen from fixed noise.

    dy/dt = -lam' (x0(alpha y + sigma e, t) - y),  lam = log(sigma / alpha)     [BOOT, arXiv:2306.05544]
    ddim: y_s = y_t + (1 - r) (x0_t - y_t), exact where x0 is constant (DERIVED; the paper's Euler step has (t - s) lam'
    for 1 - r, its first order, which exceeds 1 near data)
    heun: the mean of x0_t and of the x0 at the step's end in place of x0_t (DERIVED)

    denoise: (x_t, t) -> x0.  y_t, e: [B, ...].  s <= t: [B] of `schedule`.  Returns y_t's shape, float32 or better.
    """
    share = like(teacher_share(s, t, schedule), y_t).to(y_t)
    x0 = denoise(schedule.add_noise(y_t, e, t), t)
    if solver == "heun":
        y_s = y_t + share * (x0 - y_t)
        x0 = (x0 + denoise(schedule.add_noise(y_s, e, s), s)) / 2
    return y_t + share * (x0 - y_t)
