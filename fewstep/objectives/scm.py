"""sCM: continuous-time consistency distillation on noised data (sCD; arXiv:2410.11081)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.diffusion import LogNormalSigma
from fewstep.models.trio import Trio
from fewstep.objectives.base import register_objective
from fewstep.objectives.consistency import TRIG, Consistency, Pairs, teacher_velocity
from fewstep.rng import Rng
from fewstep.types import Batch, Need


@register_objective("scm")
@dataclass(frozen=True, kw_only=True)
class SCM(Consistency):
    """A consistency model distilled at noised samples of the data, each with its own caption.

    Two steps have the paper's middle angle of 1.1 on rectified flow with student_shift tan(1.1) = 1.96; on tables
    (VP, EDM) the shift moves an index, and the angle is another.
    """

    warmup: int = 10_000  # sCM appendix G
    mean: float = -0.1  # of ln tan(a): sCM appendix G, ImageNet 512: ln sigma -.8 with data of spread .5
    std: float = 1.6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.law()  # raises for a deviation that is none

    @property
    def needs(self) -> frozenset[Need]:
        """Real latents."""
        return frozenset({"latents", "jvp"})

    def law(self) -> LogNormalSigma:
        """Where the data are noised to."""
        return LogNormalSigma(TRIG, self.mean, self.std)

    @torch.no_grad()
    def pairs(self, trio: Trio, batch: Batch, rng: Rng) -> Pairs:
        """The data, noised to one level each, and the teacher's velocity there."""
        if batch.real is None:
            raise ValueError("scm needs real latents in the batch; see `needs`")
        x0, cond = batch.real
        t = self.law().sample(rng, "scm.t", x0.device)
        x = TRIG.add_noise(x0, rng.randn_like(x0, "scm.eps"), t)
        return Pairs(x, t, teacher_velocity(trio, self.guidance)(x, t, cond), cond)
