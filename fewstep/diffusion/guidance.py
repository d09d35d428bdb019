"""Classifier-free guidance as a wrapper of any denoiser."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.diffusion.prediction import Denoise, Prediction
from fewstep.types import Condition


def guided(denoiser: Denoise, scale: float) -> Denoise:
    """Guide a denoiser:  raw = u + scale (c - u), c with its prompt, u with the empty one     [CFG, arXiv:2207.12598]

    scale 1 means no guidance and returns the denoiser itself: one call, not two; so does scale 0 to the empty prompt.
    Below 0 it leads away from the prompt. (Self-Forcing's w is scale - 1.)
    Both branches see the same x_t and t. Every kind is affine in the raw output at equal x_t, so combining raw outputs
    guides x0, eps, v and flow alike. A family whose pipeline guides in another way says so, see `Prediction.guide`.
    Taps are the conditional branch's, at scale 0 the other's.
    The result's raw is float32 or better: c and u agree to a few digits and their difference is multiplied by scale.
    """
    if scale == 1:
        return denoiser

    def denoise(x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
        if not cond.null:
            raise ValueError(
                f"guidance {scale} needs an empty prompt, but this condition has no null tensors; "
                "encode with one, or set guidance to 1 for an unconditional model."
            )
        if scale == 0:
            return denoiser(x_t, t, cond.unconditional(), taps=taps)
        with_prompt = denoiser(x_t, t, cond, taps=taps)
        without = denoiser(x_t, t, cond.unconditional())
        dtype = torch.promote_types(with_prompt.raw.dtype, torch.float32)
        c, u = with_prompt.raw.to(dtype), without.raw.to(dtype)
        return replace(with_prompt, raw=with_prompt.guide(c, u, scale))

    return denoise
