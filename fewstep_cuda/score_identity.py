"""SiD's loss and its gradients by all that it is made of: contract and eager reference."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewstep_cuda import dispatch
from fewstep_cuda.contract import check, check_floor, like, opaque, together
from fewstep_cuda.score_difference import normaliser


class ScoreIdentity(NamedTuple):
    """What the operator answers, in float32 or better; nothing in it carries a graph."""

    value: Tensor  # [], L
    weight: Tensor  # [B], 1 / n
    grad_x: Tensor  # [B, ...], dL/dx
    grad_real: Tensor  # [B, ...], dL/dreal_x0
    grad_fake: Tensor  # [B, ...], dL/dfake_x0


@opaque
def score_identity(
    x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, alpha: float, floor: float = 1e-5, backend: str | None = None
) -> ScoreIdentity:
    """The Fisher divergence of generator and teacher through the score identity, and its three gradients.

    d = real - fake,  m = (real - x) - alpha d,  n_i = max(mean |x_i - real_i|, floor), a constant
    L = mean_i mean(d_i m_i) / n_i     [SiD, arXiv:2404.04057: L2 - alpha L1 under its weight]
    dL/dx = -d / (n numel)    dL/dreal = (m + (1 - alpha) d) / (n numel)    dL/dfake = (alpha d - m) / (n numel)
    which add up to 0: L does not change if all three are shifted.

    x, real_x0, fake_x0: [B, ...], one shape and device, any float dtype, widened and never repaired as in
    `score_difference`, which says what is raised.
    """
    inputs = {"x": x, "real_x0": real_x0, "fake_x0": fake_x0}
    check("score_identity", inputs)
    check_floor(floor)
    return dispatch.kernel("score_identity", list(inputs.values()), backend)(x, real_x0, fake_x0, alpha, floor)


def reference(x: Tensor, real_x0: Tensor, fake_x0: Tensor, alpha: float, floor: float) -> ScoreIdentity:
    """The specification of `score_identity`, in plain torch."""
    x, real_x0, fake_x0 = together(x, real_x0, fake_x0)
    n = normaliser(x - real_x0, floor)
    d = real_x0 - fake_x0
    m = (real_x0 - x) - alpha * d
    value = ((d * m).flatten(1).mean(1) / n).mean()
    scale = 1 / like(n, x) / x.numel()
    return ScoreIdentity(value, 1 / n, -d * scale, (m + (1 - alpha) * d) * scale, (alpha * d - m) * scale)
