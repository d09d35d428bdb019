"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (arXiv:2405.14867), without its GAN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fewstep.diffusion import Clamped, DiscreteUniform, Law, Shifted, guided
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, register_objective
from fewstep.objectives.rollout import Rollout, StudentSampler, backward_simulation
from fewstep.objectives.terms import denoising, distribution_matching
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role


@register_objective("dmd2")
@dataclass(frozen=True, kw_only=True)
class DMD2:
    """Distribution matching by the difference of a frozen real score and an online fake score.

    Data-free: prompts and noise are all it reads.  The critic's turn draws a rollout of its own, where the paper's
    code re-uses the generator's x on shared iterations: the same expectation for one forward more.
    """

    roles: ClassVar[frozenset[Role]] = frozenset({"fake_score"})
    needs: ClassVar[frozenset[Need]] = frozenset()

    num_steps: int = 1  # sampling steps of the student
    guidance: float = 1.75  # classifier-free guidance of the real score; DMD2 table 6, SD1.5
    turns: Turns = Turns(critic_per_generator=5)  # DMD2 section 4.2, ImageNet and SDXL
    stochastic: bool = True  # fresh noise between the student's steps; DMD2 section 4.4
    student_shift: float = 1.0  # flow shift of the student's time grid
    min_index: int = 20  # re-noising of the matching term: t = i / 999, i uniform; DMD section 3.2
    max_index: int = 980
    shift: float = 1.0  # flow shift of both re-noising laws
    floor: float = 1e-5  # least normaliser; ours

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}: it counts the student's sampling steps")
        self.law(self.min_index, self.max_index)  # raises for indices that are no interval of 0..999
        for name in ("guidance", "floor", "shift", "student_shift"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} must be a positive finite number, got {value}")

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the diffused reverse KL, estimated at one re-noised level per sample."""
        x = self.rollout(trio, batch, rng).x
        with torch.no_grad():
            t = self.law(self.min_index, self.max_index).sample(rng, "matching.t", x.device)
            x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "matching.eps"), t)
            real = guided(trio.real_score, self.guidance)(x_t, t, batch.cond).x0
            fake = trio.critic()(x_t, t, batch.cond).x0  # never guided: it models the generator, not a sharpened one
        total, weight = distribution_matching(x, real, fake, floor=self.floor)
        gap = (fake - real).square().mean().sqrt()
        return Loss(total, {"dm": total.detach(), "dm/gap_rms": gap, "dm/weight": weight.mean(), **_moments(x)})

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Keep the fake score on the generator's present distribution by denoising its samples."""
        with torch.no_grad():
            x = self.rollout(trio, batch, rng).x
            t = self.law(0, 999).sample(rng, "critic.t", x.device)
            eps = rng.randn_like(x, "critic.eps")
            x_t = trio.critic().schedule.add_noise(x, eps, t)
        loss = denoising(trio.critic()(x_t, t, batch.cond), x, eps)
        return Loss(loss, {"critic": loss.detach()})

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images."""
        return StudentSampler(self.num_steps, self.stochastic, self.student_shift)

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Rollout:
        """The generator's sample by backward simulation of its own sampler."""
        return backward_simulation(trio.generator, batch, rng, self.sampler)

    def law(self, low: int, high: int) -> Law:
        """Where samples are re-noised to: t = i / 999, i uniform over low..high, then through `shift`, a setting.

        The indices bound t after the shift too, as the flow ports of DMD2 have it.  The teacher's own shift is not read.
        """
        return Clamped(Shifted(DiscreteUniform(low, high), self.shift), low / 999, high / 999)


def _moments(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Mean and spread of the samples: drift of either is the first sign of collapse or saturation."""
    x = x.detach()
    return {"x/mean": x.mean(), "x/std": x.std()}
