"""The gradient of distribution matching: contracts and eager references."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fewstep_cuda import dispatch
from fewstep_cuda.contract import check, check_floor, like, opaque, together, wide

Kind = Literal["x0", "eps", "v", "flow"]
"""What the networks predict, with x_t = alpha x0 + sigma eps, v = alpha eps - sigma x0, flow = eps - x0."""


class ScoreDifference(NamedTuple):
    """What the operators answer, in float32 or better; nothing in it carries a graph."""

    grad: Tensor  # [B, ...], g / numel(x)
    weight: Tensor  # [B], 1 / n
    value: Tensor  # [], 0.5 mean(g^2)


@opaque
def score_difference(
    x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, floor: float = 1e-5, backend: str | None = None
) -> ScoreDifference:
    """How the sample x should move so that the fake score meets the real one, each sample on its own scale.

    n_i = max(mean |x_i - real_i|, floor)      g_i = (fake_i - real_i) / n_i        [DMD, arXiv:2311.18828, eq. 7, 8]
    grad = g / numel(x) is the gradient of 0.5 mse(x, stopgrad(x - g)) with respect to x; value is that loss.

    x, real_x0, fake_x0: [B, ...], one shape and device, any float dtype: they are widened to at least float32 before
    any subtraction. A non-finite value is never repaired: the grad of its sample and value are non-finite too.
    Raises ValueError for wrong shapes, dtypes or backends, RuntimeError under forward-mode AD.
    """
    inputs = {"x": x, "real_x0": real_x0, "fake_x0": fake_x0}
    check("score_difference", inputs)
    check_floor(floor)
    return dispatch.kernel("score_difference", list(inputs.values()), backend)(x, real_x0, fake_x0, floor)


@opaque
def score_difference_from_raw(
    x: Tensor,
    x_t: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    alpha: Tensor,
    sigma: Tensor,
    *,
    guidance: float = 1.0,
    kind: Kind,
    floor: float = 1e-5,
    backend: str | None = None,
) -> ScoreDifference:
    """`score_difference` of what three networks answered about x_t, with guidance and the conversion to x0 in one pass.

    real = uncond + guidance (cond - uncond)      x0 = p x_t + q raw, p and q by kind:
    x0: 0, 1    eps: 1 / alpha, -sigma / alpha    v: alpha / (alpha^2 + sigma^2), -sigma / (alpha^2 + sigma^2)
    flow: 1 / (alpha + sigma), -sigma / (alpha + sigma)
    fake_x0 - real_x0 is q (fake - real): x_t cancels before it is rounded.

    x, x_t, fake, cond, uncond: [B, ...], one shape and device, any float dtype, widened as there; uncond: None if
    guidance is 1.  alpha, sigma: [B] at the level of x_t.  Raises as `score_difference`.
    """
    inputs = {"x": x, "x_t": x_t, "fake": fake, "cond": cond} | ({} if uncond is None else {"uncond": uncond})
    check("score_difference_from_raw", inputs)
    check_floor(floor)
    if kind not in get_args(Kind):
        raise ValueError(f"kind {kind!r} is not known; allowed: {', '.join(get_args(Kind))}")
    if (uncond is None) != (guidance == 1):
        raise ValueError(f"uncond is for guidance other than 1, and needed then; guidance is {guidance}")
    batch = x.shape[:1]
    if alpha.shape != batch or sigma.shape != batch:
        raise ValueError(
            f"alpha and sigma must be [B] = {list(batch)}, got {list(alpha.shape)} and {list(sigma.shape)}"
        )
    run = dispatch.kernel("score_difference_from_raw", list(inputs.values()), backend)
    return run(x, x_t, fake, cond, uncond, *to_x0(kind, alpha, sigma), guidance, floor)


def to_x0(kind: Kind, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of x0 = p x_t + q raw, [B] in alpha's dtype, float32 at least."""
    alpha, sigma = wide(alpha), wide(sigma)
    if kind == "x0":
        return torch.zeros_like(alpha), torch.ones_like(alpha)
    if kind == "eps":
        return alpha.reciprocal(), sigma / -alpha
    scale = alpha + sigma if kind == "flow" else alpha.square() + sigma.square()
    return alpha / scale if kind == "v" else scale.reciprocal(), sigma / -scale


def reference(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> ScoreDifference:
    """The specification of `score_difference`, in plain torch."""
    # The real and fake predictions agree to about 1e-3, bf16 keeps 8 bits, and this difference is the whole signal.
    x, real_x0, fake_x0 = together(x, real_x0, fake_x0)
    return _scaled(x - real_x0, fake_x0 - real_x0, floor)


def reference_from_raw(
    x: Tensor,
    x_t: Tensor,
    fake: Tensor,
    cond: Tensor,
    uncond: Tensor | None,
    p: Tensor,
    q: Tensor,
    guidance: float,
    floor: float,
) -> ScoreDifference:
    """The specification of `score_difference_from_raw`.  p, q: [B], of x0 = p x_t + q raw."""
    x, x_t, fake, real = together(x, x_t, fake, cond)
    if uncond is not None:
        uncond = uncond.to(real)
        real = uncond + guidance * (real - uncond)
    p, q = (like(c.to(x), x) for c in (p, q))
    # Where p is 0 x_t takes no part, and what is not finite in it must not.
    behind = x - q * real - torch.where(p == 0, 0.0, p * x_t)
    return _scaled(behind, q * (fake - real), floor)


def normaliser(behind: Tensor, floor: float) -> Tensor:
    """mean |behind| of each sample, at least floor; [B].  behind: [B, ...]."""
    n = behind.abs().flatten(1).mean(1).clamp_min(floor)
    return n + 0 * n  # infinite -> NaN: dividing by infinity would make the gradient a silent zero


def split(numel: int) -> tuple[float, float]:
    """numel as share / power, 1 <= share < 2 and power a power of two.

    A kernel multiplies by 1 / (n share) and then, exactly, by power: neither leaves float32 before the gradient does.
    """
    mantissa, exponent = math.frexp(numel)
    return 2 * mantissa, 2.0 ** (1 - exponent)


def scales(numel: int) -> tuple[float, float, float]:
    """share and power of `split`, and half, by which a sum of (gap / (n share))^2 is 0.5 mean(g^2)."""
    share, power = split(numel)
    return share, power, 0.5 * share**2 / numel


def _scaled(behind: Tensor, gap: Tensor, floor: float) -> ScoreDifference:
    """behind: x - real; gap: fake - real; both [B, ...]."""
    n = normaliser(behind, floor)
    g = gap / like(n, gap)
    return ScoreDifference(g / gap.numel(), 1 / n, 0.5 * g.square().mean())
