"""DMD: One-step Diffusion with Distribution Matching Distillation (arXiv:2311.18828)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fewstep.diffusion import RectifiedFlow, guided
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import StudentSampler, backward_simulation
from fewstep.objectives.terms import distribution_matching, watched
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role


@register_objective("dmd")
@dataclass(frozen=True, kw_only=True)
class DMD:
    """Distribution matching in one step, held on the teacher's modes by regression on pairs of its own ODE.

    The regression is LPIPS of decoded pictures, as in the paper, or the mean-squared error of latents or points, which
    costs no decoder and loses little: on CIFAR-10 FID 2.78 against 2.66.  The embedded teachers' LPIPS is of their own
    VAE's encoder, unweighted (ours).  The paper's LAION runs also show x_ref to matching term and fake score; here
    those see the generator's own noise alone, as in its other runs.
    """

    num_steps: int = 1  # the method is a one-step one
    guidance: float = 3.0  # of the real score, and of the pairs; DMD appendix B, SD1.5 on LAION 6.25+
    turns: Turns = Turns()  # 1:1; DMD algorithm 1
    first_time: float = 1.0  # told to the step, its input is pure noise; 1: DMD
    min_index: int = 20  # re-noising of the matching term: t = i / 999, i uniform; DMD section 3.2
    max_index: int = 980
    shift: float = 1.0  # flow shift of both re-noising laws
    floor: float = 1e-5  # least normaliser; ours
    distance: Literal["mse", "lpips"] = "mse"  # DMD section 3.3: lpips, with VGG16 on 224x224
    regression_weight: float = 0.25  # 0 = none, and no pairs; DMD appendix B, all but unconditional CIFAR-10

    def __post_init__(self) -> None:
        if self.num_steps != 1:
            raise ValueError(f"num_steps must be 1, got {self.num_steps}: for more steps take --method dmd2")
        index_law(self.min_index, self.max_index)  # raises for indices that are no interval of 0..999
        check_positive(self, "guidance", "floor", "shift", "first_time")
        if not 0 <= self.regression_weight < float("inf"):
            raise ValueError(f"regression_weight must be a finite number >= 0, got {self.regression_weight}")
        if self.distance == "lpips" and not self.regression_weight:
            raise ValueError("distance 'lpips' compares pairs, and regression_weight = 0 takes none; leave one out")
        self.sampler.grid(RectifiedFlow())  # raises for a first time above 1

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score."""
        return frozenset({"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Pairs for the regression, and what compares them."""
        if not self.regression_weight:
            return frozenset()
        return frozenset({"pairs", "lpips"} if self.distance == "lpips" else {"pairs"})

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: in one step."""
        return StudentSampler(first=self.first_time)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """L_DM(G(z)) + weight l(G(z_ref), y_ref), z and z_ref of two independent streams     [DMD, algorithm 1]"""
        x, grads = backward_simulation(trio.generator, batch, rng, self.sampler).x, {}
        with torch.no_grad():
            t = index_law(self.min_index, self.max_index, self.shift).sample(rng, "matching.t", x.device)
            x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "matching.eps"), t)
            real = guided(trio.real_score, self.guidance)(x_t, t, batch.cond).x0
            fake = trio.critic()(x_t, t, batch.cond).x0
        total, weight = distribution_matching(watched(x, "dm", grads), real, fake, floor=self.floor)
        gap = (fake - real).square().mean().sqrt()
        metrics = {"dm": total.detach(), "dm/gap_rms": gap, "dm/weight": weight.mean(), **moments(x)}
        if self.regression_weight:
            loss = self.regression(trio, batch, grads)
            total, metrics["regression"] = total + self.regression_weight * loss, loss.detach()
        return Loss(total, metrics, grads)

    def regression(self, trio: Trio, batch: Batch, grads: dict[str, torch.Tensor]) -> torch.Tensor:
        """l: mean |G(z_ref) - y_ref|^2 over all elements, or the mean LPIPS.  Returns a scalar.

        grads: where its gradient at G(z_ref) goes.
        """
        if batch.pair is None:
            raise ValueError("the regression needs pairs in the batch; see `needs`")
        noise, x0, cond = batch.pair
        schedule = trio.generator.schedule
        t = self.sampler.grid(schedule).to(noise.device).expand(len(noise))
        x = watched(trio.generator(schedule.prior(noise), t, cond).x0, "regression", grads)
        return trio.sight().apart(x, x0).mean() if self.distance == "lpips" else (x - x0).square().mean()

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Keep the fake score on the generator's present distribution by denoising its samples."""
        with torch.no_grad():
            x = backward_simulation(trio.generator, batch, rng, self.sampler).x
        return fit_fake_score(trio, x, batch.cond, index_law(0, 999, self.shift), rng)
