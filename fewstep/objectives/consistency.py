"""Continuous-time consistency: what sCM and TBCM share, whatever states they take the student to.

Everything is said on TrigFlow with data of unit spread, x_t = cos(a) x0 + sin(a) eps, a = t pi / 2, where the network's
velocity F is our v and its clean estimate f = cos(a) x - sin(a) F.  Teachers on other schedules are seen there by
`on_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion import (
    RectifiedFlow,
    TrigFlow,
    check_jvp,
    directional_derivative,
    guided,
    like,
    match,
    on_schedule,
)
from fewstep.diffusion.jvp import Mode
from fewstep.models.adapters import add_own
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.base import Turns, check_positive
from fewstep.objectives.rollout import StudentSampler
from fewstep.rng import Rng
from fewstep.types import Batch, Condition, Loss, Need, Role
from fewstep_cuda import tangent_normalise

TRIG = TrigFlow()
PER_TIME = 2 / math.pi
"""da = pi / 2 dt: what our time moves while the angle moves by 1."""
WEIGHT = "log_weight"
"""The name of w(t) among the student's added parts."""

Norm = Literal["sum", "mean"]


class Pairs(NamedTuple):
    """States and the guided teacher's velocity dx/da there: x, v [N, ...], t [N] of TrigFlow, and their conditions.

    keep: [N], 1 for states that count and 0 for others; None = all do.
    """

    x: Tensor
    t: Tensor
    v: Tensor
    cond: Condition
    keep: Tensor | None = None


def consistency_tangent(student: Tensor, pairs: Pairs, jvp: Tensor, r: float) -> Tensor:
    """cos(a) times the derivative of f along the teacher's ODE; 0 where the student is consistent.

    g = -cos^2 (F - v) - r (cos sin x + J)     [sCM, arXiv:2410.11081, section 4.2 and algorithm 1]

    student: F [N, ...], no graph.  jvp: J = cos sin dF/da along (v, 1).  r: what of the term that feeds on the student
    itself takes part, 0 to 1.  At r = 0 it pulls F to v, and for 0 < r < 1 its zero is not the consistency function.
    """
    c = TRIG.at(pairs.t.to(jvp.dtype)).like(jvp)
    return -c.alpha.square() * (student - pairs.v) - r * (c.alpha * c.sigma * pairs.x + jvp)


def consistency_loss(
    student: Tensor, g: Tensor, norm: Norm, log_weight: Tensor | None = None, keep: Tensor | None = None
) -> Tensor:
    """mean exp(w) |F - stopgrad(F) - g|^2 - w     [sCM, arXiv:2410.11081, algorithm 1]

    |.|^2 by the norm that bounds g, so that w is 0 where the paper's is log D, D the elements of a sample.
    student: F [N, ...], with graph.  log_weight: w [N]; None = 0.  keep: [N], which rows count; the mean stays one over
    all N.  Returns a scalar, with gradient -2 g / N by F.
    """
    # F - stopgrad(F) first: it is exactly 0, where F + g would lose digits of a small g.
    square = _size(student - student.detach() - g, norm).square()
    rows = square if log_weight is None else log_weight.exp() * square - log_weight
    return rows.mean() if keep is None else (keep * rows).mean()


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """The loss of a student that is to be constant along the teacher's ODE, down to the data.

    Not here: positional embeddings of low frequency, double normalisation and other changes of a network.
    The paper's w(t) would make up for |g|'s size at each t.  Bounded, |g| is about 1 at any, so it is off: rCM drops it
    too [arXiv:2510.08431, section 3.1].  The further factor 1 / tan(a) of SANA-Sprint's and TBCM's code is left out: it
    is in g already, and w would absorb it (DERIVED).
    The student is trained at one scale of guidance, where SANA-Sprint tells it one of several.
    """

    num_steps: int = 1  # sampling steps of the student, which is trained for all times alike
    guidance: float = 4.5  # of the teacher's velocity, in both places where it stands; SANA-Sprint: 4, 4.5 or 5
    student_shift: float = 1.0  # flow shift of the student's time grid
    warmup: int = 4000  # iterations in which r grows from 0 to 1
    norm: Norm = "sum"  # of the tangent; sCM.  mean: per element, FastGen's default
    norm_floor: float = 0.1  # c, added to it; sCM section 4.2
    weight: bool = False  # learn w(t); ours, sCM learns it
    mode: Mode = "exact"  # of the derivative; see `directional_derivative`
    step: float | None = None  # of finite differences, in time; none = that of `directional_derivative`

    def __post_init__(self) -> None:
        for name in ("num_steps", "warmup"):
            least = 1 if name == "num_steps" else 0
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        check_positive(self, "guidance", "student_shift", "norm_floor")
        if self.step is not None and (self.mode in ("exact", "dual") or not 0 < self.step < 1):
            raise ValueError(f"step must be in (0, 1), and with mode central or forward; got {self.step}, {self.mode}")
        self.sampler.grid(RectifiedFlow())  # raises for steps or a shift that make no descending grid

    @property
    def roles(self) -> frozenset[Role]:
        """None beside the generator."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """Derivatives of the student; a method that takes its states from data adds those."""
        return frozenset({"jvp"})

    @property
    def turns(self) -> Turns:
        """The generator's alone."""
        return Turns()

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: fresh noise between steps     [sCM, section 2]"""
        return StudentSampler(self.num_steps, stochastic=True, shift=self.student_shift)

    def student(self, make: Callable[[], Denoiser], seed: int) -> Denoiser:
        """A copy of the start network, with w(t) beside it if that is to be learnt."""
        network = make()
        if self.weight:
            add_own(network.backbone.module, WEIGHT, LogWeight())
        return network

    def pairs(self, trio: Trio, batch: Batch, rng: Rng) -> Pairs:
        """Where the student is trained, without graph."""
        raise NotImplementedError

    def share(self, iteration: int) -> float:
        """r of `consistency_tangent`     [sCM, section 4.2: tangent warm-up]"""
        return min(1.0, iteration / self.warmup) if self.warmup else 1.0

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Descend the bounded tangent at the states of `pairs`."""
        pairs, r = self.pairs(trio, batch, rng), self.share(rng.iteration)
        f, primals, tangents = _path(trio.generator, pairs)
        value, jvp = directional_derivative(f, primals, tangents, mode=self.mode, step=self.step, graph=True)
        with torch.no_grad():
            raw = consistency_tangent(value, pairs, jvp, r)
            g, size = tangent_normalise(raw, self.norm_floor, norm=self.norm)
        w = trio.generator.own[WEIGHT](pairs.t) if self.weight else None
        total = consistency_loss(value, g, self.norm, w, pairs.keep)
        gap = (value.detach() - pairs.v).square().mean().sqrt()
        found = {"consistency": total, "g": size.mean(), "g/jvp": _size(jvp, self.norm).mean(), "g/teacher_rms": gap}
        return Loss(total, {name: figure.detach() for name, figure in found.items()} | {"g/r": torch.tensor(r)})

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """There is none.  Raises NotImplementedError."""
        raise NotImplementedError("a consistency method has no critic")

    def probe(self, trio: Trio, batch: Batch, rng: Rng) -> None:
        """Check the derivative that the loss takes, at its two pairs nearest to the middle of time.

        The network's own, too: on TrigFlow its v has smooth terms in t, behind which a time that it only looks up
        would hide.  Raises RuntimeError if a derivative is lost or wrong.
        """
        network = trio.generator
        made = self.pairs(trio, batch, rng)
        near = (made.t - 0.5).abs().argsort()[:2]
        pairs = Pairs(made.x[near], made.t[near], made.v[near], made.cond[near])
        f, primals, tangents = _path(network, pairs)
        names, how = ("x_t", "t"), {"mode": self.mode, "step": self.step}
        check_jvp(f, primals, tangents, names=names, **how)
        time, scale = match(pairs.t, TRIG, network.schedule)
        inputs = (like(scale.to(pairs.x), pairs.x) * pairs.x, time)
        moves = (pairs.v, torch.ones_like(time))
        check_jvp(lambda x, t: network(x, t, pairs.cond).raw, inputs, moves, names=names, **how)


class LogWeight(nn.Module):
    """w(t): a linear map of slow waves in t, 0 at first     [sCM, arXiv:2410.11081, appendix D]"""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(3), persistent=False)
        self.outer = nn.Linear(7, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    frequencies: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """[N], in the parameters' dtype.  t: [N] in [0, 1]."""
        waves = t[:, None] * self.frequencies.to(t)
        features = torch.cat([t[:, None], waves.sin(), waves.cos()], 1)
        return self.outer(features.to(self.outer.weight.dtype))[:, 0]


def teacher_velocity(trio: Trio, guidance: float) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The guided teacher's dx/da on TrigFlow.  Guidance is affine at equal x_t, so it commutes with the schedule."""
    network = trio.real_score
    seen = on_schedule(guided(network, guidance), network.schedule, TRIG)
    return lambda x, t, cond: seen(x, t, cond).v


def _path(
    network: Denoiser, pairs: Pairs
) -> tuple[Callable[..., Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """F on TrigFlow, where it is taken, and cos sin times its direction, which keeps J small at both ends."""
    seen = on_schedule(network, network.schedule, TRIG)
    c = TRIG.at(pairs.t)
    speed = c.alpha * c.sigma
    return (
        lambda x, t: seen(x, t, pairs.cond).v,
        (pairs.x, pairs.t),
        (like(speed.to(pairs.x), pairs.x) * pairs.v, speed * PER_TIME),
    )


def _size(x: Tensor, norm: Norm) -> Tensor:
    """[N]: the root of the sum of squares of each sample, or of their mean."""
    square = x.flatten(1).square()
    return (square.sum(1) if norm == "sum" else square.mean(1)).sqrt()
