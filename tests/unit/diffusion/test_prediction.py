import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import Prediction, RectifiedFlow, TrigFlow, VPTable, raw_of

KINDS = ["x0", "eps", "v", "flow"]
TIMES = torch.tensor([0.15, 0.4, 0.8])


def perfect(kind, schedule, draw, dtype=torch.float32, shape=(3, 2, 5, 4)):
    """A perfect network's prediction, and the x0, eps it was made of."""
    x0, eps, _ = draw(seed=5, shape=shape, dtype=dtype)
    x_t = schedule.add_noise(x0, eps, TIMES)
    return Prediction(raw_of(kind, x0, eps, TIMES, schedule), x_t, TIMES, kind, schedule), x0, eps


def rounding(schedule, x_t):
    """How far float32 views may be off: 8 roundings of terms as large as x_t, amplified by 1 / alpha or 1 / sigma."""
    c = schedule.at(TIMES)
    worst = torch.stack([torch.ones(3), 1 / c.alpha, 1 / c.sigma]).amax().item()
    return 8 * torch.finfo(torch.float32).eps * (1 + x_t.abs().max().item()) * worst


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_back_x0_and_eps(schedule, kind, draw):
    """Fails with any sign or divisor wrong in the table of views. B = W in the second shape: fails without `like`."""
    for shape in ((3, 2, 5, 4), (3, 2, 5, 3)):
        pred, x0, eps = perfect(kind, schedule, draw, shape=shape)
        tolerance = rounding(schedule, pred.x_t)
        assert_close(pred.x0, x0, atol=tolerance, rtol=0)
        assert_close(pred.eps, eps, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_view_equals_its_definition(schedule, kind, draw):
    """float64, so that 1e-10 leaves no room for a formula that is only nearly right."""
    pred, x0, eps = perfect(kind, schedule, draw, torch.float64)
    c = schedule.at(TIMES.double()).like(x0)
    expected = {
        "x0": x0,
        "eps": eps,
        "v": c.alpha * eps - c.sigma * x0,
        "flow": eps - x0,
        "score": (c.alpha * x0 - pred.x_t) / c.sigma**2,
    }
    for view, value in expected.items():
        assert_close(getattr(pred, view), value, atol=1e-10, rtol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("view", [*KINDS, "score"])
def test_low_precision_outputs_are_raised_before_any_difference(schedule, kind, view, draw):
    """The half-precision trap: a bfloat16 raw gives what its exact float32 copy gives, bit for bit.

    Fails if x_t - sigma eps is taken in bfloat16 and only the result raised.
    """
    pred, _, _ = perfect(kind, schedule, draw)
    raw, x_t = pred.raw.bfloat16(), pred.x_t.bfloat16()
    low, high = (Prediction(r, x, TIMES, kind, schedule) for r, x in ((raw, x_t), (raw.float(), x_t.float())))
    assert getattr(low, view).dtype == torch.float32
    assert torch.equal(getattr(low, view), getattr(high, view))


@pytest.mark.parametrize("kind", KINDS)
def test_float64_stays_float64(schedule, kind, draw):
    pred, _, _ = perfect(kind, schedule, draw, torch.float64)
    assert {getattr(pred, view).dtype for view in ("x0", "eps", "v", "flow", "score")} == {torch.float64}


@pytest.mark.parametrize("kind", KINDS)
def test_score_difference_is_the_scaled_x0_difference(schedule, kind, draw):
    """T4: score_f - score_r = alpha (D_f - D_r) / sigma^2 = (u_r - u_f) alpha / (alpha sigma + sigma^2), u = flow."""
    real, _, _ = perfect(kind, schedule, draw, torch.float64)
    nudge = draw(seed=6, dtype=torch.float64)[0]
    fake = Prediction(real.raw + 0.1 * nudge, real.x_t, TIMES, kind, schedule)
    a, s = real.coefficients.alpha, real.coefficients.sigma
    gap = fake.score - real.score
    assert_close(gap, a * (fake.x0 - real.x0) / s**2, atol=1e-6, rtol=1e-10)
    assert_close(gap, (real.flow - fake.flow) * a / (a * s + s**2), atol=1e-6, rtol=1e-10)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
def test_views_are_exact_at_pure_noise(kind, draw):
    """t = 1 on rectified flow and TrigFlow, every student's first step. Fails if eps or flow goes through 1 / alpha."""
    x0, eps, _ = draw(seed=7)
    t = torch.ones(3)
    for schedule in (RectifiedFlow(), TrigFlow()):
        pred = Prediction(raw_of(kind, x0, eps, t, schedule), schedule.add_noise(x0, eps, t), t, kind, schedule)
        for view, value in (("x0", x0), ("eps", eps), ("flow", eps - x0)):
            assert_close(getattr(pred, view), value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("kind", ["v", "flow"])
def test_views_are_exact_on_clean_data(kind, draw):
    x0, eps, _ = draw(seed=8)
    t = torch.zeros(3)
    for schedule in (RectifiedFlow(), TrigFlow()):
        pred = Prediction(raw_of(kind, x0, eps, t, schedule), x0, t, kind, schedule)
        assert_close(pred.x0, x0, atol=2e-6, rtol=0)
        assert_close(pred.eps, eps, atol=2e-6, rtol=0)


def test_x0_of_an_eps_network_at_pure_noise_is_not_finite(draw):
    """It does not exist (0 / 0); a clamped alpha would hide it from the trainer's non-finite count."""
    x0, eps, _ = draw(seed=9)
    t = torch.ones(3)
    pred = Prediction(eps, RectifiedFlow().add_noise(x0, eps, t), t, "eps", RectifiedFlow())
    assert not pred.x0.isfinite().any()


def test_forward_mode_derivatives_pass_through_a_prediction(schedule, draw):
    """d x0 / dt along a direction in (x_t, raw, t), against central differences. Fails if t is detached anywhere."""
    pred, _, _ = perfect("v", schedule, draw, torch.float64)
    tangents = (torch.ones_like(pred.raw), 0.5 * torch.ones_like(pred.x_t), torch.ones(3, dtype=torch.float64))
    point = (pred.raw, pred.x_t, TIMES.double() + 3e-4)  # away from a table index, where the slope jumps

    def x0(raw, x_t, t):
        return Prediction(raw, x_t, t, "v", schedule).x0

    _, slope = torch.func.jvp(x0, point, tangents)
    up, down = (x0(*(p + sign * 1e-6 * d for p, d in zip(point, tangents))) for sign in (1, -1))
    assert_close(slope, (up - down) / 2e-6, atol=1e-6, rtol=1e-6)


def test_gradient_reaches_raw_and_x_t(draw):
    """A generator's rollout differentiates through both. Fails if a view detaches x_t."""
    pred, _, _ = perfect("eps", VPTable.scaled_linear(), draw)
    raw, x_t = pred.raw.requires_grad_(), pred.x_t.requires_grad_()
    Prediction(raw, x_t, TIMES, "eps", VPTable.scaled_linear()).x0.sum().backward()
    assert raw.grad is not None and x_t.grad is not None
    c = VPTable.scaled_linear().at(TIMES).like(raw)
    assert_close(x_t.grad, (1 / c.alpha).expand_as(x_t))
    assert_close(raw.grad, (-c.sigma / c.alpha).expand_as(raw))


def test_targets_are_float32_or_better(draw):
    """Fails if eps - x0 is taken in bfloat16."""
    x0, eps, t = draw(seed=10, dtype=torch.bfloat16)
    target = raw_of("flow", x0, eps, t, RectifiedFlow())
    assert torch.equal(target, eps.float() - x0.float())


def test_an_unknown_kind_is_refused(draw):
    x0, _, t = draw()
    with pytest.raises(ValueError, match="no prediction kind 'epsilon'; known: x0, eps, v, flow"):
        Prediction(x0, x0, t, "epsilon", RectifiedFlow())  # type: ignore[arg-type]


def test_a_raw_output_of_another_shape_is_refused(draw):
    """Networks that also predict a variance (DiT: 2 C channels) must be cut by their backbone, not broadcast here."""
    x0, _, t = draw()
    with pytest.raises(ValueError, match="must have x_t's shape"):
        Prediction(x0[:, :1], x0, t, "eps", RectifiedFlow())
