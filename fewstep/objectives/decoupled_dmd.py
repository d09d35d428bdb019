"""Decoupled DMD (arXiv:2511.22677): guidance as a term of its own, at noise levels of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from fewstep.diffusion import EDM, Clamped, DiscreteUniform, Law, NoiseSchedule, RectifiedFlow, Shifted, shift_time
from fewstep.models.trio import Trio
from fewstep.objectives.base import register_objective
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.renoise import moments
from fewstep.objectives.rollout import Rollout
from fewstep.objectives.terms import distribution_matching, watched
from fewstep.rng import Rng
from fewstep.types import Batch, Condition

Times = Literal["shared", "full", "constrained", "hybrid"]
"""Where the terms look, DM | CA.  shared: one level for both, as DMD2.  full: both anywhere, each on its own.
constrained: both at most as noisy as the student's input.  hybrid: DM anywhere, CA as constrained; the paper's choice.
"""

Normaliser = Literal["per-term", "sum-conditional", "sum-guided"]
"""What a sample's move is divided by, n(D) = mean |x - D|; the paper names none, so all three are ours or others'.

per-term: DM by n(D_c at t_dm), CA by n(D_c at t_ca), so that neither level sets the other's scale.
sum-conditional: both by n(D_c at t_dm).  sum-guided: both by n(guided D at t_dm), as DMD2 does; one more network call
unless the level is shared.
"""


class Noised(NamedTuple):
    """x at a level of noise: x_t [B, C, H, W] and t [B] float32 in [0, 1], 0 = data."""

    x_t: Tensor
    t: Tensor


@register_objective("decoupled_dmd")
@dataclass(frozen=True, kw_only=True)
class DecoupledDMD(DMD2):
    """DMD2 whose guidance looks only at noise levels that the student's step has yet to decide about.

    delta = (D_c - D_f)(x at t_dm) + (guidance - 1)(D_c - D_u)(x at t_ca)     [arXiv:2511.22677, Eq. 6 and 8, Alg. 1]

    D: clean estimates, of the teacher with its prompt (c) and the empty one (u), and of the fake score (f).  x moves by
    delta.  Its first term, distribution matching (DM), holds the student to the teacher; the second, the augmentation
    by guidance (CA), makes few steps do, but alone it drifts without end.  Here t = 1 is noise; there it is data.
    A one-step student starts from pure noise: nothing is decided, and "constrained" and "hybrid" are "full".
    """

    times: Times = "hybrid"
    normaliser: Normaliser = "per-term"
    share_noise: bool = False  # one eps for both terms, at different levels; the paper's algorithm leaves it open

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("times", get_args(Times)), ("normaliser", get_args(Normaliser))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(allowed)}")
        if self.guidance == 1 and self.times in ("full", "hybrid"):
            raise ValueError(
                f"times={self.times!r} places the term of guidance, which guidance 1 makes zero: this would be DMD2; "
                "raise guidance, or use --method dmd2"
            )
        if self.share_noise and (self.guidance == 1 or self.times == "shared"):
            raise ValueError(
                "share_noise=True has no effect where one re-noised x serves both terms (times='shared') or guidance 1 "
                "leaves only one; leave it out"
            )
        if self.times in ("constrained", "hybrid"):
            for schedule in (RectifiedFlow(), EDM()):  # continuous times and a table's
                for step in range(self.num_steps):
                    self.law_below(self.level(schedule, step))  # raises for a step that leaves no index

    def matching(
        self, trio: Trio, batch: Batch, rollout: Rollout, rng: Rng, grads: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss whose gradient is minus delta's terms over their normalisers, by numel(x); and what to log of it.

        Network calls: 3 where the level is shared, as in DMD2, else 4, or 5 if sum-guided; 2 at guidance 1.
        Logged: dm/rms, ca/rms, by how much each term moves x (DM well above CA for long is suspect); dm/lag, the gap
        of fake and real in units of real, and dm/cos, their cosine: one rises, one falls if the fake score is behind.
        """
        x, cond = rollout.x, batch.cond
        with torch.no_grad():
            dm, ca = self.noised(x, trio.real_score.schedule, self.level(trio.generator.schedule, rollout.step), rng)
            # Neither is guided: guidance is the other term's, and the fake score models the generator as it is.
            real, fake = trio.real_score(*dm, cond).x0, trio.critic()(*dm, cond).x0
            delta, scale_of = {"dm": real - fake}, {"dm": real}
            if self.guidance != 1:
                prompted = real if ca is dm else trio.real_score(*ca, cond).x0
                delta["ca"], scale_of["ca"] = self.augmentation(trio, ca, cond, prompted), prompted
                if self.normaliser == "sum-guided":
                    real_g = real + (delta["ca"] if ca is dm else self.augmentation(trio, dm, cond, real))
                    scale_of = {"dm": real_g, "ca": real_g}
                elif self.normaliser == "sum-conditional":
                    scale_of = {"dm": real, "ca": real}
        losses = {n: move(watched(x, n, grads), delta[n], scale_of[n], floor=self.floor) for n in delta}
        total, gap = sum(losses.values(), torch.zeros_like(losses["dm"])), _rms(fake - real)
        cosine = cosine_similarity(fake.flatten(1), real.flatten(1)).mean()
        metrics = {"dm": total.detach(), "dm/gap_rms": gap, "dm/lag": gap / _rms(real), "dm/cos": cosine}
        moved = {f"{name}/rms": (2 * loss.detach()).sqrt() for name, loss in losses.items()}
        return total, {**metrics, **moved, **moments(x)}

    def augmentation(self, trio: Trio, at: Noised, cond: Condition, prompted: Tensor) -> Tensor:
        """(guidance - 1)(D_c - D_u): where guidance moves x.  prompted: D_c at the same place."""
        return (self.guidance - 1) * (prompted - trio.real_score(*at, cond.unconditional()).x0)

    def noised(self, x: Tensor, schedule: NoiseSchedule, level: float, rng: Rng) -> tuple[Noised, Noised]:
        """x re-noised for DM and for CA; the same object twice where one serves both.

        level: of the student's input.  What DM sees in "hybrid" does not depend on it.
        """
        full = self.law(self.min_index, self.max_index)
        t = (self.law_below(level) if self.times == "constrained" else full).sample(rng, "matching.t", x.device)
        eps = rng.randn_like(x, "matching.eps")
        dm = Noised(schedule.add_noise(x, eps, t), t)
        if self.times == "shared" or self.guidance == 1:
            return dm, dm
        t = (full if self.times == "full" else self.law_below(level)).sample(rng, "matching.ca.t", x.device)
        eps = eps if self.share_noise else rng.randn_like(x, "matching.ca.eps")
        return dm, Noised(schedule.add_noise(x, eps, t), t)

    def level(self, schedule: NoiseSchedule, step: int) -> float:
        """The time of the student's input at a step: 1 for the first, whatever `first_time` has it told.

        Its input is pure noise, in which nothing is decided yet; what it is told only scales its answer.
        """
        return float(self.sampler.grid(schedule)[step]) if step else 1.0

    def law_below(self, level: float) -> Law:
        """The full law given that its times are at most `level`: the same indices before the shift, cut off.

        Times are compared as the networks see them, after `shift` and `student_shift`.  So the shifted law keeps its
        shape, where a shift of indices up to `level` would put some of them above it, or, clamped, many upon it.
        level: in (0, 1].  Raises ValueError if that leaves no index.
        """
        if level * 999 >= self.max_index:
            return self.law(self.min_index, self.max_index)
        # The margin lets the index of a float32 table time be itself, not the one below.
        last = math.floor(999 * float(shift_time(torch.tensor(level).double(), 1 / self.shift)) + 1e-4)
        if last < self.min_index or level * 999 <= self.min_index:
            raise ValueError(
                f"a student's step from t = {level:.4g} leaves no cleaner level: the least is that of index "
                f"{self.min_index} under shift {self.shift:g}; lower min_index or shift, raise student_shift, take "
                "fewer steps, or set times='full'"
            )
        indices = DiscreteUniform(self.min_index, min(last, self.max_index))
        return Clamped(Shifted(indices, self.shift), self.min_index / 999, level)


def move(x: Tensor, delta: Tensor, scale_of: Tensor, *, floor: float) -> Tensor:
    """0.5 mean (delta / n)^2, n = mean |x - scale_of| per sample, at least floor; descent moves x along delta / n.

    dL/dx = -delta / n / numel(x), by definition: `distribution_matching` of an estimate and of one that lies delta
    behind it.  All [B, C, H, W].  Returns a scalar.
    """
    return distribution_matching(x, scale_of, scale_of - delta, floor=floor)[0]


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()
