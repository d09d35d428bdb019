"""SwiftBrush: variational score distillation in one step, with an adapter as fake score (arXiv:2312.05239)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.diffusion import RectifiedFlow, guided
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive, register_objective
from fewstep.objectives.renoise import fit_fake_score, index_law, moments
from fewstep.objectives.rollout import Rollout, StudentSampler, backward_simulation
from fewstep.objectives.terms import noise_error, variational, watched
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role


@register_objective("swiftbrush")
@dataclass(frozen=True, kw_only=True)
class SwiftBrush:
    """Variational score distillation: x moves along the difference of two guided scores, under a weight of time alone.

    Data-free.  As in the paper with --sharing lora-fake: a full student, and a fake score that is LoRA on the teacher;
    such an adapter needs a far larger rate than the student (the paper's: 1e-3 and 1e-6).  At the first iteration fake
    and real score are one network, and the student stands still.
    Guidance cancels where the student's distributions are the prompts' own: it speeds the way there but sharpens
    nothing (DERIVED), where DMD2 and SiD end at the guided teacher.
    Version 2 starts from another one-step student, --student RUN, and adds a CLIP loss of decoded pictures, clamped
    lest it take over     [SwiftBrush v2, arXiv:2408.14176].  How its weight falls to 0 is not known to us; here, in a
    straight line.  Of its two networks' average and its real pictures there is nothing here.
    The paper is on VP, its weight sigma^2 on a difference in eps; on other schedules the weight is that of VP at the
    same signal-to-noise ratio (DERIVED).
    """

    num_steps: int = 1  # the method is a one-step one
    guidance: float = 4.5  # of both scores, never of the student; SwiftBrush's code
    turns: Turns = Turns()  # 1:1, student first; SwiftBrush algorithm 1
    first_time: float = 1.0  # told to the step, its input is pure noise; SwiftBrush: the last index
    drop_prompt: float = 0.1  # share of the fake score's turns that see the empty prompt only; SwiftBrush's code
    min_index: int = 20  # re-noising of the student's term: t = i / 999, i uniform; SwiftBrush's code
    max_index: int = 980
    shift: float = 1.0  # flow shift of both re-noising laws
    clip_weight: float = 0.0  # of the CLIP loss at the start; SwiftBrush v2: .1
    clip_margin: float = 0.35  # cosine from which a picture fits its prompt well enough; SwiftBrush v2, ViT-B/32
    clip_until: int | None = None  # iteration at which that weight has fallen to 0; none = it stays
    clip: str | None = None  # folder of a transformers CLIPModel; none = the teacher's own; SwiftBrush v2: ViT-B/32

    def __post_init__(self) -> None:
        if self.num_steps != 1:
            raise ValueError(f"num_steps must be 1, got {self.num_steps}: for more steps take --method dmd2 or sid")
        index_law(self.min_index, self.max_index)  # raises for indices that are no interval of 0..999
        check_positive(self, "guidance", "shift", "first_time")
        if not 0 <= self.drop_prompt < 1:
            raise ValueError(f"drop_prompt must be in [0, 1), got {self.drop_prompt}: it is a share of the turns")
        if not 0 <= self.clip_weight < float("inf"):
            raise ValueError(f"clip_weight must be a finite number >= 0, got {self.clip_weight}")
        if not -1 < self.clip_margin <= 1:
            raise ValueError(f"clip_margin is a cosine and must be in (-1, 1], got {self.clip_margin}")
        if self.clip_until is not None and self.clip_until < 1:
            raise ValueError(f"clip_until must be >= 1 iterations, or null, got {self.clip_until}")
        if not self.clip_weight and (self.clip, self.clip_until) != (None, None):
            raise ValueError("clip and clip_until have no meaning at clip_weight 0; leave them out, or give a weight")
        self.sampler.grid(RectifiedFlow())  # raises for a first time above 1

    @property
    def roles(self) -> frozenset[Role]:
        """The fake score."""
        return frozenset({"fake_score"})

    @property
    def needs(self) -> frozenset[Need]:
        """Nothing, or what looks at pictures."""
        return frozenset({"clip"} if self.clip_weight else ())

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: in one step."""
        return StudentSampler(first=self.first_time)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the difference of the guided scores at one re-noised level per sample; neither is differentiated.

        Version 2 adds weight max(0, margin - cos(picture, prompt)), the mean over the batch.
        """
        x, grads = self.rollout(trio, batch, rng).x, {}
        with torch.no_grad():
            t = index_law(self.min_index, self.max_index, self.shift).sample(rng, "vsd.t", x.device)
            x_t = trio.real_score.schedule.add_noise(x, rng.randn_like(x, "vsd.eps"), t)
            real = guided(trio.real_score, self.guidance)(x_t, t, batch.cond)
            fake = guided(trio.critic(), self.guidance)(x_t, t, batch.cond)
        total = variational(watched(x, "vsd", grads), real, fake)
        gap = (fake.x0 - real.x0).square().mean().sqrt()
        metrics = {"vsd": total.detach(), "vsd/gap_rms": gap, **moments(x)}
        if weight := self.clip_share(rng.iteration):
            cosines = trio.sight().fits(watched(x, "clip", grads), batch.prompts)
            total = total + weight * (self.clip_margin - cosines).clamp_min(0).mean()
            metrics["clip/cosine"] = cosines.detach().mean()
        return Loss(total, metrics, grads)

    def clip_share(self, iteration: int) -> float:
        """The CLIP loss's weight at an iteration, counted from 0."""
        left = 1.0 if self.clip_until is None else max(0.0, 1 - iteration / self.clip_until)
        return self.clip_weight * left

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Keep the fake score on the student's present distribution by denoising its samples, weighted by alpha^2."""
        with torch.no_grad():
            x = self.rollout(trio, batch, rng).x
        # The student keeps its prompts: the fake score's empty one must mean all that it makes, as the teacher's does.
        cond = batch.cond.unconditional() if self.guidance != 1 and self.drops(rng) else batch.cond
        return fit_fake_score(trio, x, cond, index_law(0, 999, self.shift), rng, error=noise_error)

    def drops(self, rng: Rng) -> bool:
        """Whether this turn's whole global batch is without prompts: about `drop_prompt` of all turns are."""
        return rng.shared_int("critic.drop", 1_000_000) < self.drop_prompt * 1_000_000

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Rollout:
        """The student's sample."""
        return backward_simulation(trio.generator, batch, rng, self.sampler)
