"""One forward, any view of it: x0, eps, v, flow and score from a network's raw output, in float32 or better."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, get_args

import torch
from torch import Tensor

from fewstep.diffusion.schedules import Coefficients, NoiseSchedule
from fewstep.types import Condition, Kind

# view = (p x_t + q raw) / d for each (what the network predicts, what is wanted), a = alpha, s = sigma. All follow from
# x_t = a x0 + s eps, v = a eps - s x0, flow = eps - x0. Each is the direct formula: going through x0 or eps would
# divide by an a or s that cancels, e.g. flow -> eps at a = 0.
_SOLVE: Mapping[tuple[str, str], Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float, Tensor]]] = {
    ("x0", "eps"): lambda a, s: (1.0, -a, s),
    ("x0", "v"): lambda a, s: (a, -(a**2 + s**2), s),
    ("x0", "flow"): lambda a, s: (1.0, -(a + s), s),
    ("eps", "x0"): lambda a, s: (1.0, -s, a),
    ("eps", "v"): lambda a, s: (-s, a**2 + s**2, a),
    ("eps", "flow"): lambda a, s: (-1.0, a + s, a),
    ("v", "x0"): lambda a, s: (a, -s, a**2 + s**2),
    ("v", "eps"): lambda a, s: (s, a, a**2 + s**2),
    ("v", "flow"): lambda a, s: (s - a, a + s, a**2 + s**2),
    ("flow", "x0"): lambda a, s: (1.0, -s, a + s),
    ("flow", "eps"): lambda a, s: (1.0, a, a + s),
    ("flow", "v"): lambda a, s: (a - s, a**2 + s**2, a + s),
}

Guide = Callable[[Tensor, Tensor, float], Tensor]
"""(c, u, scale) -> the guided raw output of c, with the prompt, and u, with the empty one: all [B, ...]."""


def extrapolated(c: Tensor, u: Tensor, scale: float) -> Tensor:
    """u + scale (c - u)     [CFG, arXiv:2207.12598]"""
    return u + scale * (c - u)


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a network said about x_t at time t, readable as x0, eps, v, flow or score.

    v = alpha eps - sigma x0,  flow = eps - x0 (on every schedule),  score = -eps / sigma.

    raw, x_t: [B, ...], any float dtype.  t: [B] float32 in [0, 1], 0 = data.  Every view: [B, ...] in raw's dtype,
    float32 at least; raw and x_t are raised to it before any difference.
    taps: features for a GAN's head, by name.  guide: how its network's family guides.
    Not finite, and not clamped, because the views do not exist there: x0, v, flow of an eps network where alpha = 0
    (rectified flow, TrigFlow at t = 1); eps, v, flow of an x0 network where sigma = 0 (the same two at t = 0); score
    wherever sigma = 0.
    """

    raw: Tensor
    x_t: Tensor
    t: Tensor
    kind: Kind
    schedule: NoiseSchedule
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    guide: Guide = extrapolated

    def __post_init__(self) -> None:
        check_kind(self.kind)
        if self.raw.shape != self.x_t.shape:
            raise ValueError(f"raw output {tuple(self.raw.shape)} must have x_t's shape {tuple(self.x_t.shape)}.")

    @property
    def x0(self) -> Tensor:
        return self._view("x0")

    @property
    def eps(self) -> Tensor:
        return self._view("eps")

    @property
    def v(self) -> Tensor:
        return self._view("v")

    @property
    def flow(self) -> Tensor:
        return self._view("flow")

    @property
    def score(self) -> Tensor:
        """grad log p(x_t) = -eps / sigma = (alpha x0 - x_t) / sigma^2     [DMD2, arXiv:2405.14867, eq. 1]"""
        return -self.eps / self.coefficients.sigma

    @cached_property
    def coefficients(self) -> Coefficients:
        """The schedule at t, shaped to multiply x_t: each [B, 1, ...] in the views' dtype."""
        return self.schedule.at(self.t.to(self._dtype)).like(self.x_t)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.promote_types(self.raw.dtype, torch.float32)

    def _view(self, wanted: Kind) -> Tensor:
        raw = self.raw.to(self._dtype)
        if wanted == self.kind:
            return raw
        p, q, d = _SOLVE[self.kind, wanted](self.coefficients.alpha, self.coefficients.sigma)
        return (p * self.x_t.to(self._dtype) + q * raw) / d


class Denoise(Protocol):
    """What samplers and guidance call: a Denoiser, a guided one, or a closed form."""

    def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
        """x_t: [B, ...].  t: [B] float32 in [0, 1], 0 = data."""
        ...


def raw_of(kind: Kind, x0: Tensor, eps: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What a perfect network of this kind would answer about x_t = alpha x0 + sigma eps; the regression target.

    x0 | eps | v = alpha eps - sigma x0 | flow = eps - x0

    x0, eps: [B, ...], any float dtype.  t: [B] float32 in [0, 1], 0 = data.  Returns [B, ...] in float32 or better.
    """
    check_kind(kind)
    dtype = torch.promote_types(torch.promote_types(x0.dtype, eps.dtype), torch.float32)
    x0, eps = x0.to(dtype), eps.to(dtype)
    if kind == "x0":
        return x0
    if kind == "eps":
        return eps
    if kind == "flow":
        return eps - x0
    c = schedule.at(t.to(dtype)).like(x0)
    return c.alpha * eps - c.sigma * x0


def check_kind(kind: str) -> None:
    """Raises ValueError for an unknown kind."""
    if kind not in get_args(Kind):
        raise ValueError(f"no prediction kind {kind!r}; known: {', '.join(get_args(Kind))} (EDM networks answer 'x0').")
