"""Pure loss terms, each with its equation.  Differences and reductions are float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fewstep.diffusion import EDM, Prediction, raw_of
from fewstep_cuda import score_difference


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to x is known: `value` forwards, `grad` backwards.

    The gradient is scaled in place, so a second backward would give a wrong one; it raises instead.
    """

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
        ctx.grad = grad.to(x.dtype)
        return value.clone()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        if ctx.grad is None:
            raise RuntimeError(
                "distribution_matching was back-propagated twice; compute the loss anew for each backward"
            )
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grad_outputs[0].to(grad.dtype)), None, None


def distribution_matching(x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, floor: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss as its gradient surrogate, and the per-sample weight.

    n = mean |x - real_x0| over all but B, at least `floor`;  g = (fake_x0 - real_x0) / n
    L = 0.5 mse(x, stopgrad(x - g)), so dL/dx = g / numel(x)     [DMD, arXiv:2311.18828, Eq. 7-8 in Alg. 2's form]

    x: the generator's sample, with graph; real_x0 (guided), fake_x0: both scores' clean estimates at the re-noised x.
    All [B, C, H, W].  Returns (scalar L, weight 1/n [B]).  L is no measure of progress: it is 0.5 mean(g^2).
    """
    grad, weight, value = score_difference(x.detach(), real_x0, fake_x0, floor=floor)
    return _WithGradient.apply(x, value, grad), weight  # type: ignore[return-value]


def denoising(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """The fake score's regression: mean-squared error in what its network predicts.

    eps, v and flow networks: mean (raw - target)^2.  x0 networks, by EDM's weight (its alpha is 1):
    mean (alpha^2/sigma^2 + 1/sigma_data^2)(x0_hat - x0)^2.     [DMD, arXiv:2311.18828, Eq. 6 and Alg. 3]

    sigma_data is the EDM schedule's; 0.5, its default, on others.
    x0, eps: what pred.x_t was made of, [B, C, H, W].  Returns a scalar.
    """
    target = raw_of(pred.kind, x0, eps, pred.t, pred.schedule)
    error = (pred.raw.to(target.dtype) - target).square().flatten(1).mean(1)
    if pred.kind == "x0":
        c = pred.schedule.at(pred.t)
        sigma_data = pred.schedule.sigma_data if isinstance(pred.schedule, EDM) else 0.5
        # EDM's cleanest level is sigma .002; a schedule that reaches 0 would weigh a rounding error infinitely.
        error = error * ((c.alpha / c.sigma.clamp_min(2e-3)).square() + sigma_data**-2)
    return error.mean()


def gan_generator(fake_logits: Tensor) -> Tensor:
    """mean softplus(-l): the generator's non-saturating loss     [DMD2, arXiv:2405.14867, Eq. 4]

    fake_logits: [B, K] of the generator's samples, real = positive.  Returns a scalar.
    """
    return softplus(-_wide(fake_logits)).mean()


def gan_critic(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(-l_real) + mean softplus(l_fake): the discriminator's logistic loss     [DMD2, Eq. 4]

    Its minimum is l = log(p_real / p_fake), where it is 2 log 2 - 2 JSD.  Logits: [B, K].  Returns a scalar.
    """
    return softplus(-_wide(real_logits)).mean() + softplus(_wide(fake_logits)).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor, sigma: float) -> Tensor:
    """mean (l(x + sigma n) - l(x))^2 / sigma^2: R1 without a second backward.

    In expectation over n it is |dl/dx|^2 up to O(sigma^2).
    real_logits, perturbed_logits: [B, K] of real samples and of the same with noise of deviation sigma added.  This is
    the form of Self-Forcing's code; FastGen leaves the division out, so that its weight w is our w sigma^2.
    """
    return (_wide(perturbed_logits) - _wide(real_logits)).square().mean() / sigma**2


def _wide(logits: Tensor) -> Tensor:
    """float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
