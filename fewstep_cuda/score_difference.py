"""The gradient of distribution matching: contract and eager reference."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fewstep_cuda import dispatch


class ScoreDifference(NamedTuple):
    """What the operator answers, in float32 or better; nothing in it carries a graph."""

    grad: Tensor  # [B, ...], g / numel(x)
    weight: Tensor  # [B], 1 / n
    value: Tensor  # [], 0.5 mean(g^2)


@torch.no_grad()
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
    dispatch.choose(backend)
    _check(x, real_x0, fake_x0, floor)
    # The real and fake predictions agree to about 1e-3, bf16 keeps 8 bits, and this difference is the whole signal.
    wide = torch.promote_types(torch.promote_types(x.dtype, real_x0.dtype), fake_x0.dtype)
    wide = torch.promote_types(wide, torch.float32)
    x, real_x0, fake_x0 = x.to(wide), real_x0.to(wide), fake_x0.to(wide)

    n = (x - real_x0).abs().flatten(1).mean(1).clamp_min(floor)
    n = n + 0 * n  # infinite -> NaN: dividing by infinity would make g a silent zero
    g = (fake_x0 - real_x0) / n.view(-1, *[1] * (x.ndim - 1))
    return ScoreDifference(g / x.numel(), 1 / n, 0.5 * g.square().mean())


def _check(x: Tensor, real_x0: Tensor, fake_x0: Tensor, floor: float) -> None:
    inputs = {"x": x, "real_x0": real_x0, "fake_x0": fake_x0}
    if not x.shape == real_x0.shape == fake_x0.shape or x.ndim < 2 or x.numel() == 0:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        raise ValueError(f"score_difference needs three equal, non-empty shapes [B, ...], got {shapes}")
    if not all(tensor.is_floating_point() and tensor.device == x.device for tensor in inputs.values()):
        found = ", ".join(f"{name} {tensor.dtype} on {tensor.device}" for name, tensor in inputs.items())
        raise ValueError(f"score_difference needs floats on one device, got {found}")
    if not floor > 0:
        raise ValueError(f"floor must be positive, got {floor}: a sample that equals real_x0 would divide by zero")
    for name, tensor in inputs.items():
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise RuntimeError(f"score_difference is a gradient by definition and has no tangent; {name} carries one")
