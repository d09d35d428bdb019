"""TMD: Transition Matching Distillation (arXiv:2601.09881)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion import Shifted, Uniform
from fewstep.diffusion.jvp import Mode, check_jvp, directional_derivative
from fewstep.diffusion.schedules import like
from fewstep.models.denoiser import Denoiser
from fewstep.models.flow_head import flow_head, inner_grid, with_flow_head
from fewstep.models.trio import Trio
from fewstep.objectives.base import Stage, Turns, check_positive, register_objective
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.rollout import Rollout, StudentSampler
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role


class Transition(NamedTuple):
    """A step of the outer flow: data x, noise x1 and what lies between them, x_t, all [B, C, H, W]; t [B]."""

    x: Tensor
    x1: Tensor
    x_t: Tensor
    t: Tensor


@register_objective("tmd")
@dataclass(frozen=True, kw_only=True)
class TMD(DMD2):
    """A flow head learns to draw, from a transformer's features m of x_t, the transition y = x1 - x in a few steps.

    Stage 1, for a share `pretraining` of the iterations, is `TransitionMeanFlow`.  Stage 2, the losses of this class,
    is DMD2 on x = x1 - y, with the gradient through all inner steps and m.  Both begin from noised data: the batch's
    real latents under their own captions (in the paper the teacher's samples).  Rectified flow and transformers only.
    Not as in the paper: the GAN noises real and generated samples apart, the fake score is fitted in what its network
    predicts instead of x0.
    """

    num_steps: int = 2  # M, steps of the outer flow; TMD section 4
    stochastic: bool = False  # no noise but the inner flow's; TMD algorithm 1
    student_shift: float = 10.0  # of the outer grid; TMD A.2
    first_time: float = 0.999  # t_M; TMD section 3
    head_blocks: int = 5  # H, the last of the network's blocks; TMD section 4
    inner_steps: int = 2  # N, steps of the inner flow; TMD section 4
    inner_grid_shift: float = 10.0  # of its grid; TMD A.2
    gate: float = -4.0  # the fusion's at the start, before its sigmoid; DERIVED
    pretraining: float = 3 / 7  # stage 1's share of the iterations, 3k to 4k; TMD table 7, 1.3B, two steps
    pretraining_rate: float = 1.0  # stage 1's learning rates by stage 2's; TMD table 7: 3 at 1.3B, 1 at 14B
    pretraining_guidance: float = 3.0  # of the conditional velocity; TMD A.2
    drop_prompt: float = 0.1  # share of stage 1's samples without prompt, if it is guided; TMD A.2
    inner_shift: float = 3.0  # of the law of s, uniform in .001 .. .999; TMD A.2
    still: float = 0.75  # share of stage 1's batches with r = s; TMD A.2
    adaptive: float = 1.0  # c / D of stage 1's weight; TMD A.2: 1 at 1.3B, 1e-5 at 14B
    jvp: Mode = "central"  # TMD A.2
    jvp_step: float | None = None  # of time; none = 1e-4: TMD's 5e-3 is half wrong where a network is told 1000 t
    guidance: float = 5.0  # classifier-free guidance of the real score; TMD A.3
    min_index: int = 1  # re-noising of the matching term: t = i / 999, i uniform; TMD A.3
    max_index: int = 998
    shift: float = 5.0  # flow shift of that law, without which modes are lost; TMD A.3
    turns: Turns = Turns(critic_per_generator=5, exclusive=True)  # TMD A.3
    gan_weight: float = 0.03  # TMD A.3; 0 = no GAN
    gan_critic_weight: float = 1.0  # ours
    gan_features: Literal["fake", "teacher"] = "teacher"  # TMD A.3
    judged: Literal["noise", "state"] = "noise"  # x1 - y; TMD Eq. 15.  state: x_t - t y, what the sampler takes; ours
    simulated: bool = False  # stage 2 starts from the student's own states, not noised data; ours, DMD2 section 4.5

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("head_blocks", "inner_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        check_positive(self, "pretraining_rate", "pretraining_guidance", "inner_shift", "inner_grid_shift", "adaptive")
        for name in ("pretraining", "drop_prompt", "still"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must be in [0, 1], got {getattr(self, name)}")
        if not isfinite(self.gate):
            raise ValueError(f"gate must be finite, got {self.gate}; its sigmoid is what the head hears of y_s")
        if self.jvp_step is not None and (self.jvp in ("exact", "dual") or not self.jvp_step > 0):
            raise ValueError(f"jvp_step={self.jvp_step} has no meaning with jvp={self.jvp!r}; leave it out")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Transition matching, then distribution matching; a share of 0 or 1 leaves one of them out."""
        first = Stage(TransitionMeanFlow(self), self.pretraining, self.pretraining_rate)
        both = first, Stage(self, 1 - self.pretraining)
        return tuple(stage for stage in both if stage.share > 0)

    @property
    def roles(self) -> frozenset[Role]:
        """DMD2's, unless stage 1 is all."""
        return super().roles if self.pretraining < 1 else frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """Blocks; real latents but for simulated states without a GAN; derivatives for stage 1."""
        first: frozenset[Need] = frozenset({"blocks", "latents", "jvp"} if self.pretraining else {"blocks"})
        second: frozenset[Need] = super().needs if self.simulated else frozenset({"latents"})
        return first | second if self.pretraining < 1 else first

    def student(self, make: Callable[[], Denoiser], seed: int) -> Denoiser:
        """The start network with a flow head."""
        grid = inner_grid(self.inner_steps, self.inner_grid_shift)
        return with_flow_head(make(), blocks=self.head_blocks, grid=grid, gate=self.gate, seed=seed)

    def evaluations(self, depth: int) -> float:
        """What an image costs in forwards of a network of so many blocks: M (1 + (N - 1) H / L)     [TMD, Eq. 16]"""
        return self.num_steps * (1 + (self.inner_steps - 1) * self.head_blocks / depth)

    def transition(self, trio: Trio, batch: Batch, rng: Rng) -> Transition:
        """Data noised to times of the sampler's grid, drawn uniformly for each sample."""
        x, schedule = _real(batch).x0, trio.generator.schedule
        grid = self.sampler.grid(schedule).to(x.device)
        t = grid[(rng.rand("outer.t") * len(grid)).long()]
        x1 = rng.randn_like(x, "outer.noise")
        return Transition(x, x1, schedule.add_noise(x, x1, t), t)

    def rollout(self, trio: Trio, batch: Batch, rng: Rng) -> Rollout:
        """x = x1 - y, y of the head's rollout on noised data     [TMD, arXiv:2601.09881, Eq. 15]

        It asks y to fit x1, not x_t, while the sampler's x_t - t y = (1 - t) x_data + t (x1 - y): unless y tells both,
        an average of two samples, which is too narrow.  Little at the paper's t >= .909, much at .5; there `judged`
        should be "state".  `step` is 0, each sample having a time of its own.
        """
        if self.simulated:
            return super().rollout(trio, batch, rng)
        _, x1, x_t, t = self.transition(trio, batch, rng)
        cond = batch.cond.also(noise=rng.randn_like(x1, "inner.noise"))
        said = trio.generator(x_t, t, cond)
        return Rollout(said.x0 if self.judged == "state" else x1 - said.flow, 0)

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """DMD2's."""
        return super().generator_loss(trio, self.shown(batch), rng)

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss | Iterator[Loss]:
        """DMD2's."""
        return super().critic_loss(trio, self.shown(batch), rng)

    def shown(self, batch: Batch) -> Batch:
        """The batch with the prompts that its rollout is made for: noised data's own captions."""
        return batch if self.simulated else replace(batch, cond=_real(batch).cond)

    def probe(self, trio: Trio, batch: Batch, rng: Rng) -> None:
        """Raises RuntimeError if stage 1's derivative is not sound."""
        draw = TransitionMeanFlow(self).draw(trio, batch, rng, still=False)
        check_jvp(draw.u, *draw.direction, names=("y_s", "s"), mode=self.jvp, step=self.jvp_step)


class Draw(NamedTuple):
    """A place of the inner flow: (y_s, s) -> u(y_s, s, r), y_s and its velocity v [B, C, H, W]; s and r [B]."""

    u: Callable[[Tensor, Tensor], Tensor]
    y_s: Tensor
    v: Tensor
    s: Tensor
    r: Tensor

    @property
    def direction(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(y_s, s) and how they move along the path; m, y1 and r stand still."""
        return (self.y_s, self.s), (self.v, torch.ones_like(self.s))


@dataclass(frozen=True)
class TransitionMeanFlow:
    """TMD's stage 1: the head becomes a conditional flow map, by MeanFlow on the inner flow.

    y_s = (1 - s) y + s y1,  v = y1 - y,  u(y_s, s, r; m) = y1 - head(y_s, s, r; m)
    L = |u - stopgrad(v - (s - r) du/ds)|^2 under the weight 1 / stopgrad(|..|^2 + c)
                                                                [TMD, arXiv:2601.09881, section 3.1 and algorithm 2]
    u is the mean velocity from s down to r, a time of the inner grid; the head then begins as the teacher's velocity.
    The gradient goes through m into the whole network.
    """

    method: TMD
    turns: Turns = Turns(exclusive=True)  # the generator alone

    @property
    def roles(self) -> frozenset[Role]:
        """None."""
        return frozenset()

    @property
    def needs(self) -> frozenset[Need]:
        """Real latents, and derivatives."""
        return frozenset({"latents", "jvp"})

    @property
    def sampler(self) -> StudentSampler:
        """The method's."""
        return self.method.sampler

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """Most batches have r = s and take the conditional velocity as it is; the others' targets look ahead."""
        still = _chance(rng, "inner.still", self.method.still)
        u, target = self.target(self.draw(trio, batch, rng, still), still)
        error = (u - target).square().flatten(1).mean(1)
        total = (error / (error.detach() + self.method.adaptive)).mean()
        return Loss(total, {"tm": total.detach(), f"tm/{'still' if still else 'moving'}": error.detach().mean()})

    def target(self, draw: Draw, still: bool = False) -> tuple[Tensor, Tensor]:
        """u, with graph, and what it is to be: v - (s - r) du/ds, without."""
        if still:
            return draw.u(draw.y_s, draw.s), draw.v
        how: Any = {"mode": self.method.jvp, "step": self.method.jvp_step, "graph": True}
        u, du = directional_derivative(draw.u, *draw.direction, **how)
        return u, draw.v - like(draw.s - draw.r, du).to(du) * du

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss:
        """There is none."""
        raise AssertionError("transition matching has no critic")

    def draw(self, trio: Trio, batch: Batch, rng: Rng, still: bool) -> Draw:
        """A transition, a place on its inner flow, and u from there: down to itself or to the grid's time below.

        v is guided: w v + (1 - w) u(y_s, s, s; m of the empty prompt)     [MeanFlow, arXiv:2505.13447, with kappa 0]
        but for samples whose prompt is dropped.
        """
        method, network = self.method, flow_head(trio.generator)
        x, x1, x_t, t = method.transition(trio, batch, rng)
        y, y1 = x1 - x, rng.randn_like(x, "inner.noise")
        s = Shifted(Uniform(0.001, 0.999), method.inner_shift).sample(rng, "inner.s", x.device)
        r = s if still else network.below(s)
        y_s = trio.generator.schedule.add_noise(y, y1, s)
        cond, v = _real(batch).cond, y1 - y
        if method.pretraining_guidance != 1:
            keep = rng.rand("inner.drop") >= method.drop_prompt
            with torch.no_grad():
                empty = y1 - network.head(network.main(x_t, t, cond.unconditional()), y_s, s, s)
            v = v + like(keep, v) * (method.pretraining_guidance - 1) * (v - empty)
            cond = cond.emptied(~keep)
        memory = network.main(x_t, t, cond)
        return Draw(lambda y_s, s: y1 - network.head(memory, y_s, s, r), y_s, v, s, r)


def _real(batch: Batch) -> Any:
    if batch.real is None:
        raise ValueError("TMD noises real latents, which this batch has none of; see `needs`")
    return batch.real


def _chance(rng: Rng, stream: str, share: float) -> bool:
    """True in that share of the turns, for the whole global batch."""
    return rng.shared_int(stream, 1_000_000) < share * 1_000_000
