"""A denoiser seen on another schedule than its own, by equal signal-to-noise ratio."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Denoise, Prediction
from fewstep.diffusion.schedules import NoiseSchedule, like, match
from fewstep.types import Condition

EDGE = 1e-9
"""How near an end of [0, 1] the log-SNR of a time is taken: at the end it is infinite, and its derivative no number."""


def on_schedule(denoise: Denoise, native: NoiseSchedule, schedule: NoiseSchedule) -> Denoise:
    """The same denoiser with states and times of `schedule`, answering with its v there.

    It is told c x at the time of equal SNR (c: see `match`), and what it says of x0 and eps holds on both schedules:
    sigma(t') / alpha(t') = tan(angle), F = (cos x - x0) / sin on TrigFlow     [rCM, arXiv:2510.08431, Eq. 3]

    native: the denoiser's own schedule.  Any kind of network; x, v: [B, ...], t: [B] of `schedule`.
    Exact, and differentiable in x and t.  From rectified flow to TrigFlow it is SANA-Sprint's map (arXiv:2503.09641).
    Where `schedule` goes further than `native` (t = 1 seen by a VP table, whose last level still holds signal) the
    nearer end is told, and the answer keeps what the network says of the part that the state is free of: x0 in the
    noisy half, where v is (alpha x - x0) / sigma up to scale, eps in the clean one.  Neither divides by a small number.
    """

    def denoiser(x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
        dtype = torch.promote_types(x_t.dtype, torch.float32)
        time, scale = match(_inside(t), schedule, native)
        said = denoise(like(scale.to(dtype), x_t) * x_t.to(dtype), time.to(t.dtype), cond, taps=taps)
        by_x0 = Prediction(said.x0, x_t, t, "x0", schedule)
        by_eps = Prediction(said.eps, x_t, t, "eps", schedule)
        noisy = by_x0.coefficients.sigma > by_x0.coefficients.alpha
        return Prediction(torch.where(noisy, by_x0.v, by_eps.v), x_t, t, "v", schedule, said.taps)

    return denoiser


def _inside(t: Tensor) -> Tensor:
    """t [B] in float64, kept off the ends by EDGE but with its derivative."""
    t = t.double()
    return t + (t.clamp(EDGE, 1 - EDGE) - t).detach()
