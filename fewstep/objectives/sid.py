"""SiD: Score identity Distillation (arXiv:2404.04057), guided (2406.01561), adversarial (2410.14919), few-step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion import Law, Prediction, guided
from fewstep.models.denoiser import Denoiser
from fewstep.models.discriminator import Pooled, taps_of
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.gan import contest, judged, real_of
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import Rollout, StudentSampler, backward_simulation
from fewstep.objectives.terms import denoising, gan_generator, score_identity, watched, with_gradient
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Real, Role


@register_objective("sid")
@dataclass(frozen=True, kw_only=True)
class SiD:
    """Matching of the real score in Fisher divergence, by an identity whose gradient runs through both scores.

    Data-free, prompts and noise are all it reads, unless gan_weight asks for SiDA's adversarial term: the fake score's
    own features judge noised samples, real ones positive, and the fake score learns that beside its denoising.
    Few-step SiD's gan_weight is 1e-3, told by a survey; beside what scale of the identity, and its critic's: NOT FOUND.
    Guidance of the two scores: equal (LSG, the default); guidance=1 with fake_guidance=0 (Zero-CFG) or below
    (Anti-CFG), both made for training with real data; fake_guidance=1 guides the real score alone.
    Where fake and real score are one network, as at the start under LSG, nothing moves the generator, so the paper
    updates the fake score first.  One iteration of critic_warmup is that order: critic, generator, critic, ...
    With several steps [arXiv:2505.12674] the mixture of all steps' samples is matched: one's error may make up for
    another's.
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
    gan_weight: float = 0.0  # of the generator's GAN loss, 0 = no GAN; SiDA: 1e-4 beside a mean over elements, DERIVED
    gan_critic_weight: float = 3e-2  # of the discriminator's; SiDA's E[lambda] / 2 over CIFAR-10's 3072 values, DERIVED
    gan_head: Literal["pooled", "learned"] = "pooled"  # logits: the features' mean over channels, SiDA; DMD2's head
    gan_taps: tuple[str, ...] = ()  # modules of the fake score whose outputs those are; none = the family's own
    gan_warmup: int = 1  # first iterations whose generator is not judged; ours.  SiDA: 200k images

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
        self._check_gan()

    def _check_gan(self) -> None:
        if not 0 <= self.gan_weight < float("inf"):
            raise ValueError(f"gan_weight must be a finite number >= 0, got {self.gan_weight}; 0 is no GAN")
        if self.gan_weight:
            check_positive(self, "gan_critic_weight")
            if self.gan_head not in ("pooled", "learned"):
                raise ValueError(f"gan_head must be 'pooled' or 'learned', got {self.gan_head!r}")
            if self.gan_warmup < 1:
                raise ValueError(f"gan_warmup must be >= 1, got {self.gan_warmup}: the critic learns to judge first")
            return
        idle = [f.name for f in fields(self) if f.name.startswith("gan_") and getattr(self, f.name) != f.default]
        if idle:
            raise ValueError(f"without a GAN {', '.join(idle)} would have no effect; give gan_weight > 0 too")

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score, and a head that the GAN learns."""
        return frozenset({"fake_score", "head"} if self.gan_weight and self.gan_head == "learned" else {"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Real latents for the GAN."""
        return frozenset({"latents"} if self.gan_weight else ())

    @property
    def k(self) -> float:
        """The scale of the fake score."""
        return self.guidance if self.fake_guidance is None else self.fake_guidance

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the score identity, and the GAN's loss if there is one.

        The graph through both scores is gone before the generator's is walked back.
        """
        x = self.rollout(trio, batch, rng).x
        leaf, grads = x.detach().requires_grad_(), {}
        with _evaluating(trio.critic()):  # dropout in one of two equal networks would look like a difference of scores
            total, metrics = self.identity(trio, leaf, batch.cond, rng)
            if self.gan_weight and rng.iteration >= self.gan_warmup:
                loss = self.gan_loss(trio, watched(leaf, "gan", grads), batch.cond, metrics["sid/weight"], rng)
                total, metrics["gan"] = total + self.gan_weight * loss, loss.detach()
            # A loss scaler does not reach this backward: per element, not per mean, it stays within fp16's range.
            (grad,) = torch.autograd.grad(total, leaf, torch.full_like(total, x.numel()))
        # A node of its own would add the identity's two paths before the GAN's: other last digits.
        grads["sid"] = grad - grads.get("gan", 0)
        return Loss(with_gradient(x, total.detach(), grad / x.numel()), metrics, grads)

    def identity(self, trio: Trio, x: Tensor, cond: Condition, rng: Rng) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the generator's samples x [B, C, H, W], at one re-noised level per sample; and what to log."""
        t = self.law().sample(rng, "identity.t", x.device)
        x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "identity.eps"), t)
        real = guided(trio.real_score, self.guidance)(x_t, t, cond).x0
        fake = guided(trio.critic(), self.k)(x_t, t, cond).x0
        total, weight = score_identity(x, real, fake, alpha=self.alpha, floor=self.floor)
        gap = (fake - real).detach().square().mean().sqrt()
        return total, {"sid": total.detach(), "sid/gap_rms": gap, "sid/weight": weight.mean(), **moments(x)}

    def gan_loss(self, trio: Trio, x: Tensor, cond: Condition, weight: Tensor, rng: Rng) -> Tensor:
        """mean softplus(-clamp(l, -10, 10)) mean(1 / n), l the logits, n the identity's normaliser   [SiDA, 2410.14919]

        Both means are of the micro-batch, as the paper's are of one device's batch; their product is why one batch in
        two micro-batches differs from one in one.  Here x is re-noised anew, in the paper as for the identity.
        """
        return gan_generator(self.logits(trio, x, cond, *self.noise(x, rng)).clamp(-10, 10)) * weight

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss | Iterator[Loss]:
        """Keep the fake score, as it is guided, on the generator's present distribution by denoising its samples.

        Then the GAN, whose real samples lose their prompts in the same rows.
        """
        if self.k not in (0, 1) and self.drop_prompt:
            batch = _emptied(batch, rng.rand("critic.drop") < self.drop_prompt)
        with torch.no_grad(), _evaluating(trio.generator):
            x = self.rollout(trio, batch, rng).x
        first = fit_fake_score(trio, x, batch.cond, self.law(), rng, guidance=self.k, error=_denoising)
        return self._and_gan(first, trio, batch, x, rng) if self.gan_weight else first

    def _and_gan(self, first: Loss, trio: Trio, batch: Batch, x: Tensor, rng: Rng) -> Iterator[Loss]:
        """Two losses, one after the other, as DMD2's."""
        yield first
        yield self.gan_critic_loss(trio, batch, x, rng)

    def gan_critic_loss(self, trio: Trio, batch: Batch, x: Tensor, rng: Rng) -> Loss:
        """What the discriminator descends: real samples against the generator's x, at one level and noise per pair.

        [SiDA, arXiv:2410.14919], but: its lambda(sigma) multiplies a scalar, so that its mean is in gan_critic_weight;
        both sides share labels there and have their own prompts here; the fake score denoises at levels of its own.
        """
        real, noise = real_of(batch), self.noise(x, rng)
        of_real = self.logits(trio, real.x0, real.cond, *noise)
        loss, metrics = contest(of_real, self.logits(trio, x, batch.cond, *noise))
        return Loss(self.gan_critic_weight * loss, metrics)

    def logits(self, trio: Trio, x: Tensor, cond: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """The logits [B, K] of samples x.  They hear the prompt, whatever the guidance     [few-step SiD]"""
        network = self.features(trio)
        head = trio.discriminator() if self.gan_head == "learned" else Pooled(taps_of(network, cond, self.gan_taps))
        return judged(network, head, x, cond, t, eps)

    def features(self, trio: Trio) -> Denoiser:
        """The network whose features judge: the fake score."""
        return trio.critic()

    def noise(self, x: Tensor, rng: Rng) -> tuple[Tensor, Tensor]:
        """Where and how the GAN re-noises x: t [B] under the law of the other losses, eps of x's shape."""
        return self.law().sample(rng, "gan.t", x.device), rng.randn_like(x, "gan.eps")

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


def _emptied(batch: Batch, rows: Tensor) -> Batch:
    """The batch without the prompts of these rows, [B] bool."""
    real = batch.real and Real(batch.real.x0, batch.real.cond.emptied(rows))
    return replace(batch, cond=batch.cond.emptied(rows), real=real)


@contextmanager
def _evaluating(network: Denoiser) -> Iterator[None]:
    """Within it the network is in evaluation mode: no dropout."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)
