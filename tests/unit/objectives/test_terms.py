"""Loss terms against closed forms (T1-T6 of the DMD family's catalogue)."""

import math

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM, Prediction, RectifiedFlow, VPTable, raw_of
from fewstep.objectives.terms import denoising, distribution_matching, shares, watched

SCHEDULES = {"flow": RectifiedFlow(), "vp": VPTable.scaled_linear(), "edm": EDM()}
SHAPE = (3, 2, 5, 3)


def samples(seed: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in range(3)]


def direction(x, real, fake, **options):
    """The gradient that autograd gives x, times numel: g itself."""
    x = x.clone().requires_grad_()
    loss, _ = distribution_matching(x, real, fake, **options)
    (grad,) = torch.autograd.grad(loss, x)
    return grad * x.numel()


def test_nothing_moves_when_fake_equals_real():
    """T1, also where x is the real estimate itself, so that the normaliser stands at its floor."""
    x, real, _ = samples()
    assert direction(x, real, real).abs().max() == 0
    assert direction(real, real, real).abs().max() == 0


def test_autograd_of_the_loss_is_the_score_difference():
    """T5: d/dx of 0.5 mse(x, stopgrad(x - g)).  Fails if the value's own graph is differentiated instead."""
    x, real, fake = samples()
    g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    assert_close(direction(x, real, fake), g)
    x = x.requires_grad_()
    surrogate = 0.5 * (x - (x - g).detach()).square().mean()
    loss, weight = distribution_matching(x, real, fake)
    assert_close(loss, surrogate)
    assert_close(torch.autograd.grad(loss, x), torch.autograd.grad(surrogate, x))
    assert_close(weight, 1 / (x - real).abs().mean((1, 2, 3)))


def test_the_gradient_follows_what_multiplies_the_loss():
    """Accumulation divides the loss; the known gradient must be divided too.  Fails if backward ignores grad_output."""
    x, real, fake = samples()
    x = x.requires_grad_()
    (whole,) = torch.autograd.grad(distribution_matching(x, real, fake)[0], x)
    (quarter,) = torch.autograd.grad(distribution_matching(x, real, fake)[0] / 4, x)
    assert_close(quarter, whole / 4)


def test_a_second_backward_is_refused():
    x, real, fake = samples()
    x = x.requires_grad_()
    loss, _ = distribution_matching(x, real, fake)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


def test_scores_receive_no_gradient():
    x, real, fake = (s.requires_grad_() for s in samples())
    distribution_matching(x, real, fake)[0].backward()
    assert x.grad is not None and real.grad is None and fake.grad is None


def test_each_sample_has_its_own_normaliser():
    """T6.  Fails for a whole-batch denominator: changing sample 1 would then move sample 0's direction."""
    x, real, fake = samples()
    before = direction(x, real, fake)
    other = real.clone()
    other[1] += 3
    after = direction(x, other, fake)
    assert_close(after[0], before[0])
    assert_close(direction(2.5 * x, 2.5 * real, 2.5 * fake), before)


@pytest.mark.parametrize("name", SCHEDULES)
def test_real_and_fake_gaussians_differ_by_the_known_shift(name):
    """T2: real N(0, c^2), fake N(m, c^2) give D_f - D_r = m sigma^2 / V for every x_t."""
    schedule, c, m = SCHEDULES[name], 0.5, 0.3
    t = torch.full((3,), 0.5, dtype=torch.float64)
    at = schedule.at(t).like(torch.empty(SHAPE))
    x_t = samples()[0]

    def denoised(mean):
        gain = at.alpha * c**2 / (at.alpha**2 * c**2 + at.sigma**2)
        return mean + gain * (x_t - at.alpha * mean)

    expected = m * at.sigma**2 / (at.alpha**2 * c**2 + at.sigma**2)
    assert_close(denoised(m) - denoised(0.0), expected.expand(SHAPE))
    if name == "flow":
        assert expected[0].item() == pytest.approx(0.24)


def test_the_gradient_is_that_of_the_diffused_kl():
    """T3, golden: E[a (s_f - s_r)] and its moment with z for (m_r, c_r, m_f, c_f, a, s) = (.2, .6, .5, .4, .8, .6)."""
    m_r, c_r, m_f, c_f, a, s = 0.2, 0.6, 0.5, 0.4, 0.8, 0.6
    generator = torch.Generator().manual_seed(0)
    z, eps = torch.randn(2, 2_000_000, generator=generator, dtype=torch.float64)
    x_t = a * (m_f + c_f * z) + s * eps
    v_r, v_f = a**2 * c_r**2 + s**2, a**2 * c_f**2 + s**2
    difference = a * (-(x_t - a * m_f) / v_f + (x_t - a * m_r) / v_r)
    # 2e6 draws: standard errors are about 2e-4 and 4e-4.
    assert difference.mean().item() == pytest.approx(0.325203, abs=1e-3)
    assert (difference * z).mean().item() == pytest.approx(-0.120029, abs=2e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_score_difference_is_the_scaled_difference_of_clean_estimates(name):
    """T4: s_f - s_r = a (D_f - D_r) / sigma^2, and in v: (v_r - v_f) a / (a sigma + sigma^2) with v = eps - x0."""
    schedule = SCHEDULES[name]
    x_t, real, fake = samples()
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    at = schedule.at(t).like(x_t)
    r, f = (Prediction(x0, x_t, t, "x0", schedule) for x0 in (real, fake))
    assert_close(f.score - r.score, at.alpha * (fake - real) / at.sigma**2)
    assert_close(f.score - r.score, (r.flow - f.flow) * at.alpha / (at.alpha * at.sigma + at.sigma**2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_subtracted_in_float32(dtype):
    """Fails if the cast follows the subtraction: bf16 keeps 8 bits, and near-equal estimates lose their difference."""
    x, real, _ = samples(dtype=torch.float32)
    real = real.to(dtype)
    fake = real.float() + 1e-3
    g = direction(x, real, fake)
    n = (x - real.float()).abs().mean((1, 2, 3), keepdim=True)
    assert_close(g, (1e-3 / n).expand(SHAPE), rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_denoising_is_mean_squared_error_in_the_networks_own_terms(name, kind):
    schedule = SCHEDULES[name]
    x0, eps, error = samples()
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    raw = raw_of(kind, x0, eps, t, schedule) + error
    pred = Prediction(raw, schedule.add_noise(x0, eps, t), t, kind, schedule)
    assert_close(denoising(pred, x0, eps), error.square().mean())


def test_denoising_of_edm_has_the_papers_weight():
    """(sigma^-2 + sigma_data^-2) on each sample.  Fails if the weight is averaged over the batch first."""
    schedule = EDM()
    x0, eps, error = samples()
    t = torch.tensor([0.3, 0.6, 0.9], dtype=torch.float64)
    sigma = schedule.at(t).sigma
    pred = Prediction(x0 + error, schedule.add_noise(x0, eps, t), t, "x0", schedule)
    expected = ((sigma**-2 + 4) * error.square().mean((1, 2, 3))).mean()
    assert_close(denoising(pred, x0, eps), expected)


def test_denoising_is_finite_on_clean_data():
    """Rectified flow at t = 0 has no noise: EDM's weight would be infinite there."""
    x0, eps, error = samples()
    pred = Prediction(x0 + 1e-3 * error, x0, torch.zeros(3), "x0", RectifiedFlow())
    assert math.isfinite(denoising(pred, x0, eps).item())


def test_each_terms_gradient_is_told_apart_and_none_is_changed():
    """3 |x - p|^2 / 2 + c.x / 4, both times 8 as a loss scaler would: 24 (x - p) and 2 c; shares know of no 8.

    Fails with a hook at x itself, where the sum arrives, with shares exchanged, of squares, or taken before backward.
    """
    x, p, c = samples()
    x = x.requires_grad_()
    grads: dict[str, torch.Tensor] = {}
    first, second = watched(x, "first", grads), watched(x, "second", grads)
    loss = 3 * (first - p).square().sum() / 2 + (c * second).sum() / 4
    (8 * loss).backward()
    assert_close(grads, {"first": (24 * (x - p)).detach(), "second": 2 * c})
    assert_close(x.grad, 24 * (x - p).detach() + 2 * c)
    a, b = (float(grad.norm()) for grad in grads.values())
    found = {name: float(share) for name, share in shares(grads).items()}
    assert found == pytest.approx({"grad/first": a / (a + b), "grad/second": b / (a + b)}, rel=1e-6)


def test_terms_without_a_gradient_have_no_share():
    """A single term has nothing to share with; what no gradient reaches counts 0, and two of that are not 0 / 0."""
    x, still = samples()[0].requires_grad_(), samples()[1]
    grads: dict[str, torch.Tensor] = {}
    watched(x, "one", grads).sum().backward()
    assert shares(grads) == {}
    assert torch.equal(watched(still, "still", grads), still)
    assert {name: float(share) for name, share in shares(grads).items()} == {"grad/one": 1, "grad/still": 0}
    assert not any(shares({"a": torch.zeros(()), "b": torch.zeros(3)}).values())
