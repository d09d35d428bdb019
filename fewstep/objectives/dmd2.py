"""DMD2: Improved Distribution Matching Distillation for Fast Image Synthesis (arXiv:2405.14867)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion import Law, RectifiedFlow, guided
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.gan import contest, judged, real_of
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import Rollout, StudentSampler, backward_simulation
from fewstep.objectives.terms import approximate_r1, distribution_matching, gan_generator, watched
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Role


@register_objective("dmd2")
@dataclass(frozen=True, kw_only=True)
class DMD2:
    """Distribution matching by the difference of a frozen real score and an online fake score, and a GAN if asked for.

    With gan_weight 0 it is data-free: prompts and noise are all it reads.  The critic's turn draws a rollout of its
    own, where the paper's code re-uses the generator's x on shared iterations: the same expectation for one forward
    more.
    """

    num_steps: int = 1  # sampling steps of the student
    guidance: float = 1.75  # classifier-free guidance of the real score; DMD2 table 6, SD1.5
    turns: Turns = Turns(critic_per_generator=5)  # DMD2 section 4.2, ImageNet and SDXL
    stochastic: bool = True  # fresh noise between the student's steps; DMD2 section 4.4
    student_shift: float = 1.0  # flow shift of the student's time grid
    first_time: float = 1.0  # told to the first step (of more than one: at least .6, .8; ours); DMD2 F.4, SDXL: 0.4
    min_index: int = 20  # re-noising of the matching term: t = i / 999, i uniform; DMD section 3.2
    max_index: int = 980
    shift: float = 1.0  # flow shift of both re-noising laws
    floor: float = 1e-5  # least normaliser; ours
    gan_weight: float = 0.0  # of the generator's GAN loss, 0 = no GAN; DMD2: 1e-3 (SD1.5) .. 5e-3 (SDXL)
    gan_critic_weight: float = 1e-2  # of the discriminator's loss; DMD2 appendix F
    gan_features: Literal["fake", "teacher"] = "fake"  # whose features the head reads; DMD2: the fake score's
    gan_taps: tuple[str, ...] = ()  # modules whose outputs those are; none = the network family's own
    gan_start: int = (
        0  # iteration of the critic's first GAN loss, the generator follows; late, on a converged run: DMD2
    )
    r1_weight: float = 0.0  # approximate R1, 0 = none, as in DMD2
    r1_sigma: float = 0.1  # its perturbation; FastGen

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}: it counts the student's sampling steps")
        self.law(self.min_index, self.max_index)  # raises for indices that are no interval of 0..999
        check_positive(self, "guidance", "floor", "shift", "student_shift", "first_time", "r1_sigma")
        for name in ("gan_weight", "gan_critic_weight", "gan_start", "r1_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a finite number >= 0, got {value}")
        if self.gan_weight and not self.gan_critic_weight:
            raise ValueError(
                "gan_weight > 0 needs gan_critic_weight > 0: the generator would be judged by a random head"
            )
        if self.r1_weight and not self.gan_weight:
            raise ValueError("r1_weight > 0 regularises the GAN's head; give gan_weight > 0 too")
        self.sampler.grid(RectifiedFlow())  # raises for steps or a first time that make no descending grid

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score, and the head of the GAN if there is one."""
        return frozenset({"fake_score", "head"} if self.gan_weight else {"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Real latents for the GAN."""
        return frozenset({"latents"} if self.gan_weight else ())

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the matching term, and the GAN's once it takes part."""
        rollout, grads = self.rollout(trio, batch, rng), {}
        total, metrics = self.matching(trio, batch, rollout, rng, grads)
        if self.adversarial(rng) and rng.iteration > self.gan_start:  # by then the head has moved once
            x = watched(rollout.x, "gan", grads)
            loss = gan_generator(self.logits(trio, x, batch.cond, *self.noise(x, rng, "gan")))
            total, metrics["gan"] = total + self.gan_weight * loss, loss.detach()
        return Loss(total, metrics, grads)

    def matching(
        self, trio: Trio, batch: Batch, rollout: Rollout, rng: Rng, grads: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The diffused reverse KL's loss, estimated at one re-noised level per sample, and what to log of it.

        grads: where its gradient goes, see `watched`.
        """
        x = rollout.x
        with torch.no_grad():
            t = self.law(self.min_index, self.max_index).sample(rng, "matching.t", x.device)
            x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "matching.eps"), t)
            real = guided(trio.real_score, self.guidance)(x_t, t, batch.cond).x0
            fake = trio.critic()(x_t, t, batch.cond).x0  # never guided: it models the generator, not a sharpened one
        total, weight = distribution_matching(watched(x, "dm", grads), real, fake, floor=self.floor)
        gap = (fake - real).square().mean().sqrt()
        return total, {"dm": total.detach(), "dm/gap_rms": gap, "dm/weight": weight.mean(), **moments(x)}

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss | Iterator[Loss]:
        """Keep the fake score on the generator's present distribution by denoising its samples; then the GAN."""
        with torch.no_grad():
            x = self.rollout(trio, batch, rng).x
        first = fit_fake_score(trio, x, batch.cond, self.law(0, 999), rng)
        return self._and_gan(first, trio, batch, x, rng) if self.adversarial(rng) else first

    def _and_gan(self, first: Loss, trio: Trio, batch: Batch, x: Tensor, rng: Rng) -> Iterator[Loss]:
        """Two losses, one after the other: x has no graph, so that of the first is free before the second's is made."""
        yield first
        yield self.gan_critic_loss(trio, batch, x, rng)

    def gan_critic_loss(self, trio: Trio, batch: Batch, x: Tensor, rng: Rng) -> Loss:
        """What the discriminator descends: real samples under their own captions against the generator's x.

        Both are re-noised, to levels of their own; the fake score learns from it together with the head.
        """
        real, cond = real_of(batch)
        noise = self.noise(real, rng, "gan.real")
        of_real = self.logits(trio, real, cond, *noise)
        of_fake = self.logits(trio, x, batch.cond, *self.noise(x, rng, "gan.fake"))
        loss, metrics = contest(of_real, of_fake)
        if self.r1_weight:
            shaken = real + self.r1_sigma * rng.randn_like(real, "gan.r1")
            r1 = approximate_r1(of_real, self.logits(trio, shaken, cond, *noise), self.r1_sigma)
            loss, metrics["gan/r1"] = loss + self.r1_weight * r1, r1.detach()
        return Loss(self.gan_critic_weight * loss, metrics)

    def logits(self, trio: Trio, x: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """The discriminator's logits [B, K] of clean samples x, re-noised by eps to t."""
        return judged(self.features(trio), trio.discriminator(), x, cond, t, eps)

    def features(self, trio: Trio) -> Denoiser:
        """The network whose features the head reads."""
        return trio.critic() if self.gan_features == "fake" else trio.real_score

    def noise(self, x: Tensor, rng: Rng, stream: str) -> tuple[Tensor, Tensor]:
        """Where and how the GAN re-noises x: t over the whole range [B], eps of x's shape."""
        return self.law(0, 999).sample(rng, f"{stream}.t", x.device), rng.randn_like(x, f"{stream}.eps")

    def adversarial(self, rng: Rng) -> bool:
        """Whether the GAN takes part in this iteration."""
        return bool(self.gan_weight) and rng.iteration >= self.gan_start

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images."""
        return StudentSampler(self.num_steps, self.stochastic, self.student_shift, self.first_time)

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Rollout:
        """The generator's sample by backward simulation of its own sampler."""
        return backward_simulation(trio.generator, batch, rng, self.sampler)

    def law(self, low: int, high: int) -> Law:
        """Where samples are re-noised to: `index_law` under `shift`."""
        return index_law(low, high, self.shift)
