"""Where a method looks at the generator's samples: levels of new noise, and the fake score's fit at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.diffusion import Clamped, DiscreteUniform, Law, Prediction, Shifted, guided
from fewstep.models.trio import Trio
from fewstep.objectives.terms import denoising
from fewstep.rng import Rng
from fewstep.types import Condition, Loss


def index_law(low: int, high: int, shift: float = 1.0) -> Law:
    """t = i / 999, i uniform over low..high, then through the flow `shift`.

    The indices bound t after the shift too, as flow ports of DMD2 do.  The teacher's own shift is not read.
    Raises ValueError for indices that are no interval of 0..999.
    """
    return Clamped(Shifted(DiscreteUniform(low, high), shift), low / 999, high / 999)


def fit_fake_score(
    trio: Trio,
    x: Tensor,
    cond: Condition,
    law: Law,
    rng: Rng,
    *,
    guidance: float = 1.0,
    error: Callable[[Prediction, Tensor, Tensor], Tensor] = denoising,
) -> Loss:
    """Keep the fake score on the generator's present distribution: it denoises x at levels drawn from `law`.

    x: the generator's samples [B, C, H, W], without graph.  cond: what they were made for.  guidance: of the fake
    score, for a method that guides it everywhere.  error: (prediction, x, eps) -> the scalar that it descends.
    """
    with torch.no_grad():
        t = law.sample(rng, "critic.t", x.device)
        eps = rng.randn_like(x, "critic.eps")
        x_t = trio.critic().schedule.add_noise(x, eps, t)
    loss = error(guided(trio.critic(), guidance)(x_t, t, cond), x, eps)
    return Loss(loss, {"critic": loss.detach()})


def moments(x: Tensor) -> dict[str, Tensor]:
    """Mean and spread of the samples: drift of either is the first sign of collapse or saturation."""
    x = x.detach()
    return {"x/mean": x.mean(), "x/std": x.std()}
