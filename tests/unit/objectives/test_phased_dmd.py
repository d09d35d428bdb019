"""Phased DMD: the fake score's target inside a sub-interval, the gradient at x_s, the phases of a run."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM, NoiseSchedule, Prediction, RectifiedFlow, VPTable, raw_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.experts import Experts
from fewstep.models.trio import Trio
from fewstep.objectives.dmd2 import DMD2
from fewstep.objectives.phased_dmd import PhasedDMD
from fewstep.objectives.terms import denoising, interval_denoising, interval_matching
from fewstep.teachers.closed_form import gaussian
from fewstep.types import Batch
from tests import affine

MEAN, STD = 0.7, 0.5


@dataclass(frozen=True)
class Cosine(NoiseSchedule):
    """VP with alpha = cos(pi t / 2), the schedule of the golden numbers."""

    def curve(self, t):
        angle = t * math.pi / 2
        return angle.cos(), angle.sin(), -math.pi / 2 * angle.sin(), math.pi / 2 * angle.cos()

    def time_of(self, log_snr):
        return torch.atan((-0.5 * log_snr).exp()) * 2 / math.pi


SCHEDULES = {"flow": RectifiedFlow(), "cosine": Cosine(), "vp": VPTable.scaled_linear(), "edm": EDM()}


def states(schedule, s, t, n=400_000):
    """x_s of clean N(.7, .5^2), x_t re-noised from it and the new noise, [n, 1] float64."""
    generator = torch.Generator().manual_seed(0)
    x0, e0, eps = torch.randn(3, n, 1, generator=generator, dtype=torch.float64)
    s, t = (torch.full((n,), v, dtype=torch.float64) for v in (s, t))
    x_s = schedule.add_noise(MEAN + STD * x0, e0, s)
    return x_s, schedule.renoise(x_s, eps, s, t), eps, s, t


def fitted(schedule, kind, s, t, naive=False):
    """The minimiser a + b x_t of the regression, by the normal equations of its gradient: (a, b)."""
    x_s, x_t, eps, s, t = states(schedule, s, t)
    coefficients = torch.zeros(2, 1, 1, dtype=torch.float64, requires_grad=True)

    def loss(c):
        pred = Prediction(c[0] + c[1] * x_t, x_t, t, kind, schedule)
        return denoising(pred, x_s, eps) if naive else interval_denoising(pred, x_s, eps, s)

    def gradient(c):
        return torch.autograd.grad(loss(c), c, create_graph=True)[0].flatten()

    at_zero = gradient(coefficients)
    hessian = torch.stack([torch.autograd.grad(g, coefficients, retain_graph=True)[0].flatten() for g in at_zero])
    return torch.linalg.solve(hessian, -at_zero.detach()).tolist()


@pytest.mark.parametrize(
    ("schedule", "kind", "golden"),
    [
        ("flow", "flow", (-0.861538, 1.153846)),
        ("flow", "x0", (0.689231, 0.076923)),
        ("flow", "eps", (-0.172308, 1.230769)),
        ("cosine", "eps", (-0.221595, 1.024424)),
        ("cosine", "x0", (0.682, 0.083214)),
    ],
)
def test_the_target_is_that_of_the_whole_interval(schedule, kind, golden):
    """What the regression from x_s (s = .5, t = .8) finds is the denoiser of clean data.

    Fails if x_s is taken for clean, or with any coefficient of eps off.
    """
    assert fitted(SCHEDULES[schedule], kind, 0.5, 0.8) == pytest.approx(golden, abs=8e-3)


def test_the_naive_target_is_biased():
    assert fitted(RectifiedFlow(), "flow", 0.5, 0.8, naive=True) == pytest.approx((-0.489913, 0.999379), abs=8e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
def test_every_kind_finds_the_gaussians_denoiser(schedule, kind):
    """On tables too, and with alpha 1 on EDM, whose sigmas are far from 1."""
    made = SCHEDULES[schedule]
    a, b = fitted(made, kind, 0.4, 0.7)
    x_t, t = torch.tensor([[0.0], [1.0]], dtype=torch.float64), torch.full((2,), 0.7, dtype=torch.float64)
    c = made.at(t).like(x_t)
    x0 = MEAN + c.alpha * STD**2 / (c.alpha**2 * STD**2 + c.sigma**2) * (x_t - c.alpha * MEAN)
    raw = raw_of(kind, x0, Prediction(x0, x_t, t, "x0", made).eps, t, made).flatten()
    assert_close(torch.tensor([a, a + b], dtype=torch.float64), raw, atol=1.2e-2, rtol=1e-2)


@pytest.mark.parametrize(("s", "full"), [(0.5, 0.550), (0.625, 0.6555), (0.8333, 0.8433)])
def test_the_weight_is_whole_above_these_times(s, full):
    """min(1, 10 sigma_ts^2) of the divided form reaches 1 there, on flow."""

    def weight(t):
        return min(1.0, 10 * float(RectifiedFlow().between(torch.tensor([s]), torch.tensor([t])).sigma) ** 2)

    assert weight(full - 2e-3) < 1 and weight(full + 1e-3) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["x0", "flow"])
def test_the_multiplied_form_is_the_clamped_one(schedule, kind):
    """L = mean min(1, cap s_ts^2) (raw - target)^2 in float64; on EDM the cap is scaled by s."""
    made = SCHEDULES[schedule]
    where = (0.2, 0.21) if schedule == "edm" else (0.4, 0.45)  # where the bound binds
    x_s, x_t, eps, s, t = states(made, *where, n=50)
    pred = Prediction(0.3 * x_t, x_t, t, kind, made)
    c_s, c_t, c = made.at(s).like(x_s), made.at(t).like(x_s), made.between(s, t).like(x_s)
    x0 = x_s / c_s.alpha - c_t.alpha * c_s.sigma**2 / (c_s.alpha**2 * c.sigma) * eps
    target = raw_of(kind, x0, c_t.sigma / c.sigma * eps, t, made)
    cap = 2.5 / c_s.sigma**2 if schedule == "edm" else 10.0
    sigma_data = made.sigma_data if schedule == "edm" else 0.5
    extra = (c_t.alpha / c_t.sigma) ** 2 + sigma_data**-2 if kind == "x0" else 1.0
    wanted = ((cap * c.sigma**2).clamp(max=1) * extra * (pred.raw - target) ** 2).mean()
    assert_close(interval_denoising(pred, x_s, eps, s), wanted, atol=0, rtol=1e-9)


@pytest.mark.parametrize("gap", [0.0, 1e-6])
def test_the_loss_is_finite_where_the_interval_begins(gap):
    """In float32 at t = s and just above.  Fails if anything is divided by sigma_ts."""
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    s = torch.full((4,), 0.5)
    raw = x.clone().requires_grad_()
    loss = interval_denoising(Prediction(raw, x, s + gap, "flow", RectifiedFlow()), x, torch.ones_like(x), s)
    loss.backward()
    assert loss.isfinite() and raw.grad.isfinite().all()


def test_at_s_0_it_is_the_usual_regression():
    x, eps = torch.randn(2, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = torch.full((5,), 0.6, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    x_t = RectifiedFlow().add_noise(x, eps, t)
    for kind in ("x0", "eps", "v", "flow"):
        pred = Prediction(0.5 * x_t, x_t, t, kind, RectifiedFlow())
        assert_close(interval_denoising(pred, x, eps, s), denoising(pred, x, eps))


def test_the_gradient_at_the_state_is_the_papers():
    """w_ts (real - fake) in velocities: .183673 at s = .3, t = .7 on flow; (1 - t)^2 / t at s = 0.

    For Gaussian states of equal spread its mean is the derivative of the KL divergence, a_ts^2 (m_f - m_r) / V_t.
    """
    x = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s, t = (torch.full((2000,), v, dtype=torch.float64) for v in (0.3, 0.7))
    flow = RectifiedFlow()
    x_t = flow.renoise(x.detach(), torch.ones_like(x), s, t)
    made = [Prediction(k * x_t, x_t, t, "flow", flow) for k in (0.4, -0.3)]
    loss, weight = interval_matching(x, made[0].x0, made[1].x0, s, t, flow)
    loss.backward()
    assert_close(x.grad * x.numel(), 0.183673 * (made[0].flow - made[1].flow), atol=1e-5, rtol=1e-5)
    _, at_0 = interval_matching(x, made[0].x0, made[1].x0, None, t, flow)
    assert_close(at_0, torch.full_like(at_0, 0.09 / 0.49))
    assert weight.shape == (2000,)
    onward, c = flow.between(s, t), flow.at(t)
    clean_real, clean_fake, spread = 1.0, 0.4, 0.2  # x_s ~ N(a_s m, a_s^2 spread^2 + s_s^2)
    v_t = c.alpha[0] ** 2 * spread**2 + c.sigma[0] ** 2
    gain = c.alpha[0] * spread**2 / v_t
    real, fake = (m + gain * (x_t - c.alpha[0] * m) for m in (clean_real, clean_fake))
    y = x.detach().clone().requires_grad_()
    interval_matching(y, real, fake, s, t, flow)[0].backward()
    slope = onward.alpha[0] ** 2 * flow.at(s).alpha[0] * (clean_fake - clean_real) / v_t
    assert_close((y.grad * y.numel()).mean(), slope)


# -- the objective ------------------------------------------------------------------------------------------------


def phased(**options):
    return PhasedDMD(**{"guidance": 1.5, **options})


def players(method) -> Trio:
    plain = affine.trio()
    made = iter([plain.generator, *(affine.trio().generator for _ in range(method.phases))])
    return Trio(method.student(lambda: next(made), 0), plain.real_score, plain.fake_score)


def test_one_phase_is_dmd2_with_deterministic_steps():
    """Losses and gradients to the last bit but rounding."""
    phase, plain = phased(num_steps=2, phases=1), DMD2(num_steps=2, guidance=1.5, stochastic=False)
    given, mine, theirs = affine.batch(), players(phase), affine.trio()
    for turn, loss in (("generator", "generator_loss"), ("critic", "critic_loss")):
        for iteration in range(3):
            rng = [affine.rng(turn, iteration=iteration) for _ in range(2)]
            with mine.turn(turn), theirs.turn(turn):
                a = getattr(phase, loss)(mine, given, rng[0]).total
                b = getattr(plain, loss)(theirs, given, rng[1]).total
                a.backward()
                b.backward()
            assert_close(a, b)
    a, b = mine.generator.expert(0).backbone, theirs.generator.backbone
    assert_close((a.w.grad, a.b.grad), (b.w.grad, b.b.grad))
    assert a.w.grad.abs() > 0


@pytest.mark.parametrize("phase", [0, 1])
def test_each_phase_trains_its_expert_alone(phase):
    """And every turn only its player.  Fails if the earlier expert is not frozen, or if its steps carry gradient."""
    method = replace(phased(num_steps=4, phases=2, guidance=1.0), phase=phase)
    teacher = gaussian(fit_steps=1)
    trio = Trio.build(
        teacher.denoiser, method.roles, init=teacher.student, student=lambda make: method.student(make, 0)
    )
    given = Batch(teacher.encode([""] * 6), teacher.shape, tuple(range(6)))
    method.begin(trio)
    for turn, mine in (("generator", trio.generator.expert(phase)), ("critic", trio.critic())):
        with trio.turn(turn):
            getattr(method, f"{turn}_loss")(trio, given, affine.rng(turn)).total.backward()
        networks = (trio.generator.expert(0), trio.generator.expert(1), trio.real_score, trio.critic())
        assert [n for n in networks if any(p.grad is not None for p in n.parameters())] == [mine]
        mine.zero_grad()


@pytest.mark.parametrize("phase", [0, 1])
def test_a_rollout_runs_its_phases_steps_and_ends_at_the_next_ones_first(phase):
    """Four steps in two phases on flow: 1, .75 | .5, .25.  The exit is drawn within the phase, for the whole batch."""
    method = replace(phased(num_steps=4, phases=2), phase=phase)
    assert method.ends == (2, 4)
    seen = set()
    for iteration in range(12):
        trio = players(method)
        reached = method.rollout(trio, affine.batch(), affine.rng(iteration=iteration))
        told = [tuple(float(t[0]) for _, t, _ in trio.generator.expert(k).backbone.seen) for k in range(2)]
        seen.add(told[0] if phase == 0 else told[1])
        if phase == 0:
            assert told[1] == () and reached.s.tolist() == [0.5] * 6
            network = trio.generator.expert(0)
            x, t, _prompt = network.backbone.seen[-1]
            eps = (x - (1 - t[0]) * reached.x0) / t[0]
            assert_close(reached.state, 0.5 * reached.x0 + 0.5 * eps)
        else:
            assert told[0] == (1.0, 0.75) and reached.s is None
            assert reached.state is reached.x0
    assert seen == ({(1.0,), (1.0, 0.75)} if phase == 0 else {(0.5,), (0.5, 0.25)})


def test_levels_lie_between_the_phases_end_and_pure_noise():
    """(s, 1], the nested interval, not (s, s_before]; the fake score sees the same, to the ends."""
    method = phased(num_steps=4, phases=2)
    for turn, low, high in (("generator", 0.5 + 0.5 * 20 / 999, 0.5 + 0.5 * 980 / 999), ("critic", 0.5, 1.0)):
        trio, size = players(method), 400
        method.begin(trio)
        given = affine.batch(size)
        getattr(method, f"{turn}_loss")(trio, given, affine.rng(turn, size))
        t = trio.fake_score.backbone.seen[0][1]
        assert low - 1e-6 <= t.min() < low + 0.02 and high - 0.02 < t.max() <= high + 1e-6


def test_the_scores_see_the_state_carried_on_not_noised_anew():
    """x_t = a_ts x_s + s_ts eps in both turns; as if x_s were clean, it would hold too much noise."""
    method, flow = phased(num_steps=4, phases=2), RectifiedFlow()
    for turn, stream in (("generator", "matching"), ("critic", "critic")):
        trio, mine = players(method), affine.rng(turn)
        reached = method.rollout(trio, affine.batch(), mine)
        eps = mine.randn_like(reached.x0, f"{stream}.eps")
        getattr(method, f"{turn}_loss")(trio, affine.batch(), affine.rng(turn))
        x_t, t, _ = trio.fake_score.backbone.seen[0]
        assert_close(x_t, flow.renoise(reached.state, eps, reached.s, t).detach())


def test_the_unnormalised_loss_is_at_the_state():
    """normalise=false descends eq. 10; its direction is the normalised one's, sample by sample."""
    grads = []
    for normalise in (True, False):
        method = phased(num_steps=2, phases=2, normalise=normalise)
        trio = players(method)
        with trio.turn("generator"):
            method.generator_loss(trio, affine.batch(1), affine.rng(size=1)).total.backward()
        w, b = trio.generator.expert(0).backbone.w.grad, trio.generator.expert(0).backbone.b.grad
        grads.append(torch.stack([w, b]))
    assert_close(grads[0] / grads[0].norm(), grads[1] / grads[1].norm())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_steps": 1}, "method dmd2"),
        ({"num_steps": 2, "phases": 3}, "at most num_steps"),
        ({"phases": 0}, "1 or more"),
        ({"phase": 2}, "0..1"),
        ({"cap": 0.0}, "cap"),
        ({"min_index": 990}, "indices"),
        ({"guidance": -1.0}, "guidance"),
    ],
)
def test_bad_settings_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        PhasedDMD(**options)


def test_experts_share_the_steps_half_way_between_times():
    method = phased(num_steps=4, phases=2, student_shift=5.0)
    student = players(method).generator
    assert isinstance(student, Experts)
    assert student.bounds == pytest.approx(((0.938 + 0.833) / 2,))
    assert isinstance(student.expert(0), Denoiser)
