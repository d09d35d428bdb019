"""Two terms that move a sample, each on its own scale, in one pass: contract and eager reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fewstep_cuda import dispatch
from fewstep_cuda.contract import check, check_floor, like, opaque, together
from fewstep_cuda.score_difference import normaliser


class TwoDifferences(NamedTuple):
    """What the operator answers, in float32 or better; nothing in it carries a graph."""

    grad: Tensor  # [B, ...], g / numel(x)
    weight: Tensor  # [2, B], 1 / n of dm and of ca
    value: Tensor  # [2], 0.5 mean(g^2) of dm and of ca, each alone


@opaque
def score_difference_two(
    x: Tensor,
    dm: tuple[Tensor, Tensor],
    ca: tuple[Tensor, Tensor],
    *,
    strength: float,
    floor: float = 1e-5,
    backend: str | None = None,
) -> TwoDifferences:
    """How matching and guidance, looked at from noise levels of their own, move the sample x.

    g_i = (fake_i - real_i) / n(real)_i + strength (uncond_i - cond_i) / n(cond)_i   [arXiv:2511.22677, Eq. 6 and 8]
    n(D)_i = max(mean |x_i - D_i|, floor): each term by its own; the paper names no normaliser (DERIVED).
    grad = g / numel(x) is the gradient of 0.5 mse(x, stopgrad(x - g)) with respect to x; strength is guidance - 1.

    dm: (real, fake), the conditional teacher's and the fake score's clean estimates at the level of matching.
    ca: (cond, uncond), the teacher's at the level of guidance; cond may be real.  All [B, ...], one shape and device,
    any float dtype, widened and never repaired as in `score_difference`, which says what is raised.
    """
    inputs = {"x": x, "real": dm[0], "fake": dm[1], "cond": ca[0], "uncond": ca[1]}
    check("score_difference_two", inputs)
    check_floor(floor)
    return dispatch.kernel("score_difference_two", list(inputs.values()), backend)(x, *dm, *ca, strength, floor)


def reference(
    x: Tensor, real: Tensor, fake: Tensor, cond: Tensor, uncond: Tensor, strength: float, floor: float
) -> TwoDifferences:
    """The specification of `score_difference_two`, in plain torch."""
    x, real, fake, cond, uncond = together(x, real, fake, cond, uncond)
    n = torch.stack([normaliser(x - real, floor), normaliser(x - cond, floor)])
    dm, ca = (fake - real) / like(n[0], x), strength * (uncond - cond) / like(n[1], x)
    value = torch.stack([0.5 * dm.square().mean(), 0.5 * ca.square().mean()])
    return TwoDifferences((dm + ca) / x.numel(), 1 / n, value)
