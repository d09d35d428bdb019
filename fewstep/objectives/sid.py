"""SiD: Score identity Distillation (arXiv:2404.04057), guided (2406.01561) and in few steps (2505.12674)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from fewstep.diffusion import Law, Prediction, guided
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import Rollout, StudentSampler, backward_simulation
from fewstep.objectives.terms import denoising, score_identity, with_gradient
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Role


@register_objective("sid")
@dataclass(frozen=True, kw_only=True)
class SiD:
    """Matching of the real score in Fisher divergence, by an identity whose gradient runs through both scores.

    Data-free: prompts and noise are all it reads.  The papers' adversarial term is not here.
    Guidance of the two scores: equal (LSG, the default); guidance=1 with fake_guidance=0 (Zero-CFG) or below
    (Anti-CFG), both made for training with real data; fake_guidance=1 guides the real score alone.
    Where fake and real score are one network, as at the start under LSG, nothing moves the generator, so the paper
    updates the fake score first.  One iteration of critic_warmup is that order: critic, generator, critic, ...
    With several steps, what is matched is the mixture of all steps' samples: one's error may make up for another's.
    The fake score trains at the indices of the generator's loss, as in SiD-LSG; SiD on EDM draws its levels from EDM's
    log-normal law, and those of the generator at the indices 0..799 of our table.
    """

    num_steps: int = 1  # sampling steps of the student
    alpha: float = 1.0  # SiD-LSG; above 1 (SiD: 1.2) the sign is wrong for far too wide generators
    guidance: float = 1.5  # classifier-free guidance of the real score, k4; SiD-LSG, its best FID on SD1.5
    fake_guidance: float | None = None  # of the fake score, in training too (k1 = k2 = k3); none = `guidance`: LSG
    turns: Turns = Turns(critic_warmup=1)  # 1:1, fake score first; SiD algorithm 1
    init_sigma: float | None = 2.5  # sigma / alpha of the first step: index 625 on SD's table; SiD.  none = pure noise
    student_shift: float = 1.0  # flow shift of the student's time grid
    drop_prompt: float = 0.1  # share of empty prompts in the fake score's turn if it is guided; SiD-LSG
    min_index: int = 20  # re-noising of both losses: t = i / 999, i uniform; SiD-LSG
    max_index: int = 979
    shift: float = 1.0  # flow shift of that law
    floor: float = 1e-5  # least normaliser; SiD

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be >= 1, got {self.num_steps}: it counts the student's sampling steps")
        self.law()  # raises for indices that are no interval of 0..999
        check_positive(self, "guidance", "floor", "shift", "student_shift")
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha must be a finite number >= 0, got {self.alpha}; the papers' are 1 and 1.2")
        if not isfinite(self.k):
            raise ValueError(f"fake_guidance must be finite, or null for `guidance`; got {self.fake_guidance}")
        if self.init_sigma is not None and not 0 < self.init_sigma < float("inf"):
            raise ValueError(f"init_sigma must be positive and finite, or null for pure noise; got {self.init_sigma}")
        if not 0 <= self.drop_prompt < 1:
            raise ValueError(f"drop_prompt must be in [0, 1), got {self.drop_prompt}: it is a share of the prompts")

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score."""
        return frozenset({"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing."""
        return frozenset()

    @property
    def k(self) -> float:
        """The scale of the fake score."""
        return self.guidance if self.fake_guidance is None else self.fake_guidance

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the score identity.  Its graph through both scores is gone before the generator's is walked back."""
        x = self.rollout(trio, batch, rng).x
        leaf = x.detach().requires_grad_()
        with _evaluating(trio.critic()):  # dropout in one of two equal networks would look like a difference of scores
            total, metrics = self.identity(trio, leaf, batch.cond, rng)
            # A loss scaler does not reach this backward: per element, not per mean, it stays within fp16's range.
            (grad,) = torch.autograd.grad(total, leaf, torch.full_like(total, x.numel()))
        return Loss(with_gradient(x, total.detach(), grad / x.numel()), metrics)

    def identity(self, trio: Trio, x: Tensor, cond: Condition, rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the generator's samples x [B, C, H, W], at one re-noised level per sample; and what to log."""
        t = self.law().sample(rng, "identity.t", x.device)
        x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "identity.eps"), t)
        real = guided(trio.real_score, self.guidance)(x_t, t, cond).x0
        fake = guided(trio.critic(), self.k)(x_t, t, cond).x0
        total, weight = score_identity(x, real, fake, alpha=self.alpha, floor=self.floor)
        gap = (fake - real).detach().square().mean().sqrt()
        return total, {"sid": total.detach(), "sid/gap_rms": gap, "sid/weight": weight.mean(), **moments(x)}

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Keep the fake score, as it is guided, on the generator's present distribution by denoising its samples."""
        if self.k not in (0, 1) and self.drop_prompt:
            batch = replace(batch, cond=batch.cond.emptied(rng.rand("critic.drop") < self.drop_prompt))
        with torch.no_grad(), _evaluating(trio.generator):
            x = self.rollout(trio, batch, rng).x
        return fit_fake_score(trio, x, batch.cond, self.law(), rng, guidance=self.k, error=_denoising)

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: with fresh noise between its steps."""
        return StudentSampler(self.num_steps, shift=self.student_shift, start=self.init_sigma)

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Rollout:
        """The generator's sample of one of its steps, drawn uniformly     [few-step SiD, arXiv:2505.12674]"""
        return backward_simulation(trio.generator, batch, rng, self.sampler)

    def law(self) -> Law:
        """Where samples are re-noised to: `index_law` under `shift`."""
        return index_law(self.min_index, self.max_index, self.shift)


def _denoising(pred: Prediction, x: Tensor, eps: Tensor) -> Tensor:
    """`denoising`, but for v networks in eps: on VP, their error times alpha^2 = snr / (snr + 1)     [SiD-LSG]"""
    return (pred.eps - eps).square().mean() if pred.kind == "v" else denoising(pred, x, eps)


@contextmanager
def _evaluating(network: Denoiser) -> Iterator[None]:
    """Within it the network is in evaluation mode: no dropout."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
