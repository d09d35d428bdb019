"""Pure loss terms, each with its equation.  Differences and reductions are float32 or better."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

import fewstep_cuda
from fewstep.diffusion import EDM, NoiseSchedule, Prediction, like, raw_of


class _WithGradients(torch.autograd.Function):
    """A scalar whose gradients are known: `value` forwards, `grads` backwards.

    The gradients are scaled in place, so a second backward would give wrong ones; it raises instead.
    """

    @staticmethod
    def forward(ctx, value: Tensor, grads: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.grads = [grad.to(x.dtype) for x, grad in zip(tensors, grads, strict=True)]
        return value.clone()

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor):
        if ctx.grads is None:
            raise RuntimeError(
                "a loss with a known gradient was back-propagated twice; compute it anew for each backward"
            )
        grads, ctx.grads = ctx.grads, None
        return None, None, *(grad.mul_(grad_outputs[0].to(grad.dtype)) for grad in grads)


def with_gradient(x: Tensor, value: Tensor, grad: Tensor) -> Tensor:
    """A scalar that is `value` and whose gradient with respect to x is `grad`, for one backward.

    x: [B, ...], with graph.  grad: x's shape; it is used up.
    """
    return with_gradients(value, [x], [grad])


def with_gradients(value: Tensor, tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> Tensor:
    """The same with respect to several tensors."""
    return _WithGradients.apply(value, tuple(grads), *tensors)  # type: ignore[return-value]


def watched(x: Tensor, term: str, grads: dict[str, Tensor]) -> Tensor:
    """x itself, for one term of a loss: when its gradient comes back, dL_term/dx is written into grads[term].

    The term's weight is in it, and whatever scales the whole loss.  No second backward, and no other gradient: it
    passes as it is.  x: the student's samples [B, ...].
    """
    seen = x.view_as(x)  # a node of this term alone: at x itself only the terms' sum arrives
    grads[term] = torch.zeros((), device=x.device)  # until then, so that all processes have the same terms in one order
    if seen.requires_grad:
        seen.register_hook(lambda grad: grads.update({term: grad}))
    return seen


def shares(grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """grad/TERM = |dL_TERM/dx| / sum over terms, in [0, 1], as figures to log; nothing of a loss with a single term.

    What scales the whole loss (accumulation, a loss scaler) falls out.  Of terms that cancel, the sum is not |dL/dx|.
    grads: each term's, as `watched` left them.
    """
    if len(grads) < 2:
        return {}
    norms = {term: torch.linalg.vector_norm(_wide(grad)) for term, grad in grads.items()}
    whole = torch.stack([*norms.values()]).sum().clamp_min(torch.finfo(torch.float32).tiny)
    return {f"grad/{term}": norm / whole for term, norm in norms.items()}


def distribution_matching(x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, floor: float = 1e-5) -> tuple[Tensor, Tensor]:
    """The distribution-matching loss as its gradient surrogate, and the per-sample weight.

    n = mean |x - real_x0| over all but B, at least `floor`;  g = (fake_x0 - real_x0) / n
    L = 0.5 mse(x, stopgrad(x - g)), so dL/dx = g / numel(x)     [DMD, arXiv:2311.18828, Eq. 7-8 in Alg. 2's form]

    x: the generator's sample, with graph; real_x0 (guided), fake_x0: both scores' clean estimates at the re-noised x.
    All [B, C, H, W].  Returns (scalar L, weight 1/n [B]).  L is no measure of progress: it is 0.5 mean(g^2).
    """
    grad, weight, value = fewstep_cuda.score_difference(x, real_x0, fake_x0, floor=floor)
    return with_gradient(x, value, grad), weight


def score_identity(
    x: Tensor, real_x0: Tensor, fake_x0: Tensor, *, alpha: float, floor: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The Fisher divergence of generator and teacher through the score identity, and the per-sample weight.

    d = real_x0 - fake_x0;  n = mean |x - real_x0| over all but B, at least `floor`, stopgrad
    L = mean d ((real_x0 - x) - alpha d) / n     [SiD, arXiv:2404.04057: L2 - alpha L1 under its weight]

    x: the generator's sample; real_x0, fake_x0: both scores' clean estimates at the re-noised x.  All [B, C, H, W], and
    the gradient flows through all three: with both estimates detached it is `distribution_matching`'s for every alpha.
    Returns (scalar L, weight 1/n [B]).  L is no measure of progress: 0 at alpha = 1 once the fake score fits, wherever
    the generator is.  The paper sums over elements and multiplies by 100, a scale that Adam ignores but for its eps.
    """
    given = x, real_x0, fake_x0
    value, weight, *grads = fewstep_cuda.score_identity(*given, alpha=alpha, floor=floor)
    return with_gradients(value, given, grads), weight


def denoising(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """The fake score's regression: mean-squared error in what its network predicts.

    eps, v and flow networks: mean (raw - target)^2.  x0 networks, by EDM's weight (its alpha is 1):
    mean (alpha^2/sigma^2 + 1/sigma_data^2)(x0_hat - x0)^2.     [DMD, arXiv:2311.18828, Eq. 6 and Alg. 3]

    sigma_data is the EDM schedule's; 0.5, its default, on others.
    x0, eps: what pred.x_t was made of, [B, C, H, W].  Returns a scalar.
    """
    target = raw_of(pred.kind, x0, eps, pred.t, pred.schedule)
    error = (pred.raw.to(target.dtype) - target).square().flatten(1).mean(1)
    return (error * _edm_weight(pred)).mean()


def interval_denoising(pred: Prediction, x_s: Tensor, eps: Tensor, s: Tensor, *, cap: float = 10.0) -> Tensor:
    """The fake score's regression from samples x_s that still hold the noise of time s.

    As score(x_t) = E[-eps / s_ts | x_t],  x_t = a_ts x_s + s_ts eps,  what `denoising` regresses on becomes
    x0 -> x_s / a_s - a_t s_s^2 / (a_s^2 s_ts) eps,  eps -> s_t / s_ts eps     [Phased DMD, arXiv:2510.27684, eq. 11-12]
    whose variance has no bound at t = s, so that it is multiplied by s_ts first:
    L = mean min(1 / s_ts^2, cap) (s_ts raw - target s_ts)^2     [eq. 13; eps and v: DERIVED]
    The target of `denoising`, from x_s as if it were clean, would be biased.

    On EDM, whose sigmas are not of the order of 1, cap is divided by (2 s_s)^2: the same at s_s = 1/2 (DERIVED).
    x0 networks are weighted as in `denoising`.  s: [B] <= pred.t.  x_s, eps: [B, C, H, W].  Returns a scalar.
    """
    schedule, kind = pred.schedule, pred.kind
    at_s, at_t, ts = schedule.at(s.double()), schedule.at(pred.t.double()), schedule.between(s, pred.t)
    c_s, c_t, c_ts = (c.to(torch.promote_types(x_s.dtype, torch.float32)).like(x_s) for c in (at_s, at_t, ts))
    x0 = c_ts.sigma * _wide(x_s) / c_s.alpha - c_t.alpha * c_s.sigma.square() / c_s.alpha.square() * _wide(eps)
    target = raw_of(kind, x0, c_t.sigma * _wide(eps), pred.t, schedule)
    error = (c_ts.sigma * pred.raw.to(target.dtype) - target).square().flatten(1).mean(1)
    limit = cap / (2 * at_s.sigma).square() if isinstance(schedule, EDM) else torch.full_like(at_s.sigma, cap)
    weight = torch.minimum(ts.sigma.square().reciprocal(), limit).to(error)
    return (weight * error * _edm_weight(pred)).mean()


def _edm_weight(pred: Prediction) -> Tensor | float:
    """Of an x0 network's squared error, [B]; 1 for others."""
    if pred.kind != "x0":
        return 1.0
    c = pred.schedule.at(pred.t)
    sigma_data = pred.schedule.sigma_data if isinstance(pred.schedule, EDM) else 0.5
    # EDM's cleanest level is sigma .002; a schedule that reaches 0 would weigh a rounding error infinitely.
    return (c.alpha / c.sigma.clamp_min(2e-3)).square() + sigma_data**-2


def interval_matching(
    x_s: Tensor, real_x0: Tensor, fake_x0: Tensor, s: Tensor | None, t: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """The matching of states at time s as its gradient surrogate, unnormalised, and its weight.

    w = a_ts a_t / s_t^2,  g = w (fake_x0 - real_x0) = a_ts (score_fake - score_real)
    which is w_ts (real - fake) in velocities     [Phased DMD, arXiv:2510.27684, eq. 10]
    L = 0.5 mse(x_s, stopgrad(x_s - g)), so dL/dx_s = g / numel(x_s)

    x_s: the student's states [B, C, H, W], with graph.  s: their time [B], None for clean samples.  t: [B], where both
    clean estimates are of.  Returns (scalar L, w [B]).
    """
    c = schedule.at(t.double())
    onward = c.alpha if s is None else schedule.between(s, t).alpha
    weight = (onward * c.alpha / c.sigma.square()).to(torch.promote_types(x_s.dtype, torch.float32))
    grad = like(weight, x_s) * (_wide(fake_x0) - _wide(real_x0))
    return with_gradient(x_s, 0.5 * grad.square().mean(), grad / grad.numel()), weight


def variational(x: Tensor, real: Prediction, fake: Prediction) -> Tensor:
    """Variational score distillation as its gradient surrogate.

    g = sigma^2 (eps_real - eps_fake) = alpha sigma (fake_x0 - real_x0)  on VP     [SwiftBrush, arXiv:2312.05239]
    g = alpha sigma / (alpha^2 + sigma^2) (fake_x0 - real_x0)  on any schedule: VP's at equal alpha / sigma (DERIVED)
    L = 0.5 mse(x, stopgrad(x - g)), so dL/dx = g / numel(x)

    x: the student's sample [B, C, H, W], with graph; real, fake: both (guided) predictions at the re-noised x, without.
    Returns a scalar, 0.5 mean(g^2), which is no measure of progress.
    """
    c = real.coefficients
    grad = c.alpha * c.sigma / (c.alpha.square() + c.sigma.square()) * (fake.x0 - real.x0)
    return with_gradient(x, 0.5 * grad.square().mean(), grad / grad.numel())


def noise_error(pred: Prediction, x0: Tensor, eps: Tensor) -> Tensor:
    """A fake score's regression in eps, whatever its network predicts: mean a^2 (eps_hat - eps)^2, a^2 + s^2 = 1.

    a = alpha / sqrt(alpha^2 + sigma^2), VP's alpha at equal alpha / sigma     [SwiftBrush's code; not VP: DERIVED]

    x0, eps: what pred.x_t was made of, [B, C, H, W].  Returns a scalar.
    """
    c = pred.coefficients
    share = c.alpha.square() / (c.alpha.square() + c.sigma.square())
    if pred.kind == "x0":  # eps_hat - eps = alpha / sigma (x0 - x0_hat); at sigma 0 it does not exist
        error = (c.alpha / c.sigma.clamp_min(2e-3)) * (pred.x0 - _wide(x0))
    else:
        error = pred.eps - _wide(eps)
    return (share * error.square()).mean()


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


def _wide(value: Tensor) -> Tensor:
    """float32 or better."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
