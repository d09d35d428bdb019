"""BOOT: the Signal-ODE and its steps, what the student reads, and what it converges to."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, TrigFlow, VPTable
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.boot import BOOT, FLOW, signal_step, teacher_share
from fewstep.objectives.rollout import backward_simulation
from fewstep.types import Batch, Condition
from tests.affine import batch, rng, trio

SCHEDULES = {"cosine": TrigFlow(), "flow": RectifiedFlow(), "vp": VPTable.scaled_linear(), "edm": EDM()}
SPREAD = 0.5


def gaussian(schedule, spread=SPREAD):
    """E[x0 | x_t] of N(0, spread^2)."""

    def denoise(x, t):
        c = schedule.at(t.double()).like(x)
        return c.alpha * spread**2 / (c.alpha**2 * spread**2 + c.sigma**2) * x

    return denoise


def exact(schedule, t, spread=SPREAD):
    """y_t / e of N(0, spread^2): x_t = e sqrt(alpha^2 S^2 + sigma^2), where pure noise has variance 1."""
    c = schedule.at(t.double())
    return ((c.alpha**2 * spread**2 + c.sigma**2).sqrt() - c.sigma) / c.alpha


def recursion(schedule, steps, solver, high=1.0, low=0.0):
    """y / e at `low` after that many steps from the teacher's x0 of pure noise."""
    grid, e = torch.linspace(high, low, steps + 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    denoise = gaussian(schedule)
    y = denoise(e, grid[:1])
    for t, s in zip(grid[:-1, None], grid[1:, None]):
        y = signal_step(denoise, y, e, s, t, schedule, solver=solver)
    return float(y)


def test_the_closed_form_solves_the_signal_ode():
    """dy/dt = -lam' (x0 - y), lam = log(sigma / alpha), by differences of the closed form."""
    schedule, h = SCHEDULES["cosine"], 1e-6
    t = torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    slope = (exact(schedule, t + h) - exact(schedule, t - h)) / (2 * h)
    c, y = schedule.at(t), exact(schedule, t)
    rate = c.d_sigma / c.sigma - c.d_alpha / c.alpha
    x0 = gaussian(schedule)(c.alpha * y + c.sigma, t)
    assert_close(slope, -rate * (x0 - y), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("solver", "wanted"),
    [
        ("ddim", {10: -7.19e-2, 25: -2.99e-2, 50: -1.52e-2, 100: -7.64e-3, 200: -3.83e-3}),
        ("heun", {10: -3.55e-2, 25: -8.6e-3, 50: -2.8e-3, 100: -8.5e-4, 200: -2.5e-4}),
    ],
)
def test_steps_on_a_cosine_schedule_have_the_known_errors(solver, wanted):
    """Cosine VP from t = .999 to 1e-4.  Fails if the step is the paper's first order, or Heun's not a mean."""
    truth = float(exact(SCHEDULES["cosine"], torch.tensor([1e-4])))
    for steps, error in wanted.items():
        found = recursion(SCHEDULES["cosine"], steps, solver, 0.999, 1e-4) - truth
        assert found == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_ddim_step_is_the_deterministic_samplers(draw, name):
    """alpha_s y_s + sigma_s e = alpha_s x0 + sigma_s (x_t - alpha_t x0) / sigma_t, for any x0."""
    schedule = SCHEDULES[name]
    y_t, e, _ = draw(seed=3, dtype=torch.float64)
    x0 = draw(seed=4, dtype=torch.float64)[0]
    s, t = torch.tensor([0.1, 0.4, 0.69]).double(), torch.tensor([0.2, 0.5, 0.7]).double()
    now, then, x_t = schedule.at(t).like(e), schedule.at(s).like(e), schedule.add_noise(y_t, e, t)
    wanted = then.alpha * x0 + then.sigma * (x_t - now.alpha * x0) / now.sigma
    y_s = signal_step(lambda x, time: x0, y_t, e, s, t, schedule)
    assert_close(schedule.add_noise(y_s, e, s), wanted, atol=1e-9, rtol=1e-9)


def test_the_teachers_share_keeps_its_digits_and_its_ends():
    """1 from noise and onto data, (t - s) / (t (1 - s)) between.  Fails as 1 - exp(.) in float32."""
    t = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    s = torch.tensor([1.0, 0.95, 0.0, 0.0, 0.2, 0.5 - 1e-9], dtype=torch.float64)
    wanted = [1.0, 1.0, 1.0, 1.0, 0.3 / 0.4, 1e-9 / 0.25]
    assert teacher_share(s, t, FLOW).tolist() == pytest.approx(wanted, rel=1e-6)


def test_every_target_has_an_anchor_and_both_ends_their_share():
    """Fails if t is drawn and s = t - step: nothing would then teach the last step below noise."""
    method, size = BOOT(step=0.1, ends=0.1), 20_000
    s, t = method.times(rng(size=size))
    assert s.min() == 0 and s.max() == 1 and t.max() == 1
    assert_close(t, (s + 0.1).clamp_max(1))
    for share in ((s == 0), (s == 1)):
        assert share.double().mean() == pytest.approx(0.1, abs=0.01)
    inner = s[(s > 0) & (s < 1)]
    assert inner.mean() == pytest.approx(0.5, abs=0.01) and (inner > 0.9).double().mean() == pytest.approx(
        0.1, abs=0.02
    )


class Told(Backbone):
    """x0 = w x + b until; remembers what it read."""

    def __init__(self, w=0.5, b=0.2):
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.w, self.b = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))
        self.seen = []

    @property
    def extras(self):
        return frozenset({"until"})

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        until = cond.extra["until"]
        self.seen.append((x.detach().clone(), network_time.clone(), until.clone(), torch.is_grad_enabled()))
        return self.w * x + self.b * until[:, None, None, None]


def told_trio(schedule=FLOW):
    players = trio()
    teacher = Denoiser(players.real_score.backbone, schedule, "x0")
    return Trio(generator=Denoiser(Told(), schedule, "x0"), real_score=teacher)


@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_the_student_reads_noise_and_a_time_and_the_teacher_the_state_of_the_same_noise(name):
    """Fails if the student is told another first time or t for s, or if the teacher's state has noise of its own."""
    schedule, method = SCHEDULES[name], BOOT(solver="ddim")
    players, e = told_trio(schedule), rng().randn("boot.noise", (1, 4, 3))
    method.generator_loss(players, batch(), rng())
    s, t = method.times(rng())
    (at_t, at_s), teacher = players.generator.backbone.seen, players.real_score.backbone.seen
    for seen, until, recorded in ((at_t, t, False), (at_s, s, True)):
        assert_close(seen[0], schedule.prior(e))
        assert_close(seen[1], torch.ones(6))
        assert_close(seen[2], until)
        assert seen[3] is recorded
    y_t = 0.5 * schedule.prior(e) + 0.2 * t[:, None, None, None]
    x_t = FLOW.add_noise(y_t, e, t)
    c = schedule.at(teacher[0][1]).like(e)
    flow = FLOW.at(t).like(e)
    scale = torch.hypot(c.alpha, c.sigma) / torch.hypot(flow.alpha, flow.sigma)
    assert_close(teacher[0][0], scale * x_t, atol=1e-4, rtol=1e-4)


def test_only_the_wanted_signal_is_differentiated():
    """The target is a constant: d loss / d b = mean 2 (y_s - Y) s.  Fails if Y carries the student's graph."""
    players, method = told_trio(), BOOT(guidance=1.0)
    with players.turn("generator"):
        method.generator_loss(players, batch(), rng()).total.backward()
    b, (s, t) = players.generator.backbone.b, method.times(rng())
    e, cond = rng().randn("boot.noise", (1, 4, 3)), batch().cond
    with torch.no_grad():
        y_t, y_s = (method.signal(players.generator, e, time, cond) for time in (t, s))
        denoise = lambda x, time: players.real_score(x, time, cond).x0  # noqa: E731
        gap = y_s - signal_step(denoise, y_t, e, s, t, FLOW, solver="heun")
    assert b.grad is not None
    assert_close(b.grad, (2 * gap * s[:, None, None, None]).mean(), atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in players.real_score.parameters())


@pytest.mark.parametrize("end", [True, False])
def test_guidance_is_in_the_boundary_and_in_the_steps(end):
    """Guidance w of an affine teacher adds w times its prompt; 1 is the plain conditional one."""

    class Somewhere(BOOT):
        def times(self, rng):
            s = torch.full((6,), 1.0 if end else 0.5)
            return s, (s + self.step).clamp_max(1)

    found = []
    for guidance in (1.0, 3.0):
        players = told_trio()
        with players.turn("generator"):
            Somewhere(guidance=guidance, solver="ddim").generator_loss(players, batch(), rng()).total.backward()
        found.append(players.generator.backbone.b.grad)
        prompts = [bool(seen[2].sum() > 0) for seen in players.real_score.backbone.seen]
        assert prompts == ([True] if guidance == 1 else [True, False])
    prompt, s = batch().cond.tensors["prompt"], 1.0 if end else 0.5
    share = 1.0 if end else 0.05 / (0.55 * 0.5)
    assert_close(found[1] - found[0], -2 * s * share * (0.2 * prompt).mean(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["flow", "vp", "edm"])
def test_at_the_start_the_student_is_the_teacher_at_pure_noise(name):
    """Whatever time it is told: the boundary has nothing to teach."""
    from fewstep.teachers import gaussian as teacher_of

    teacher = teacher_of(schedule=name, fit_steps=2)
    assert teacher.student is not None
    network, method = teacher.student(), BOOT(guidance=1.0)
    students = Trio.build(network, method.roles, student=lambda make: method.student(make, 0)).generator
    e, cond = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), teacher.encode([""] * 5)
    wanted = network(network.schedule.prior(e), torch.ones(5), cond).x0
    for time in (0.0, 0.3, 1.0):
        assert_close(method.signal(students, e, torch.full((5,), time), cond), wanted)
    given = Batch(cond, (2,), tuple(range(5)))
    boundary = BOOT(guidance=1.0, step=0.9999, solver="ddim", ends=0.4999)
    players = Trio(generator=students, real_score=network)
    loss = boundary.generator_loss(players, given, rng(size=5))  # every target is the teacher's x0 of noise
    assert float(loss.total.detach()) < 1e-6


def test_sampling_asks_for_the_signal_at_data():
    players, method = told_trio(), BOOT()
    backward_simulation(players.generator, batch(), rng(), method.sampler)
    assert len(players.generator.backbone.seen) == 1
    assert_close(players.generator.backbone.seen[0][2], torch.zeros(6))


def test_an_eps_network_may_be_told_another_first_time():
    """On VP the error of eps is divided by alpha: .0683 at index 999, .653 at 399."""
    schedule, e = SCHEDULES["vp"], torch.randn(6, 1, 4, 3, generator=torch.Generator().manual_seed(1))
    sizes = []
    for first in (1.0, 0.4):
        made = []
        for b in (0.0, 1.0):
            network = Denoiser(Told(1.0, b), schedule, "eps")
            made.append(BOOT(first_time=first).signal(network, e, torch.ones(6), batch().cond))
        sizes.append(float((made[1] - made[0]).abs().mean()))
    assert sizes == pytest.approx([14.6, 0.7576 / 0.6528], rel=0.01)


class Table(Backbone):
    """y(e, s) = c(s) e, c tabulated at multiples of `step`."""

    def __init__(self, count):
        super().__init__(nn.Linear(1, 1).requires_grad_(False))
        self.count, self.c = count, nn.Parameter(torch.zeros(count + 1, dtype=torch.float64))

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        return self.c[(cond.extra["until"] * self.count).round().long()][:, None] * x.double()


class Formula(Backbone):
    """The Gaussian's denoiser."""

    def __init__(self):
        super().__init__(nn.Identity())

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        return gaussian(FLOW)(x, network_time)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
def test_a_linear_student_converges_to_the_solvers_recursion_and_not_to_the_ode(solver):
    count = 10

    class OnGrid(BOOT):
        def times(self, rng):
            s = torch.arange(count + 1) / count
            return s, (s + self.step).clamp_max(1)

    method = OnGrid(step=1 / count, guidance=1.0, solver=solver)
    network = Table(count)
    players = Trio(generator=Denoiser(network, FLOW, "x0"), real_score=Denoiser(Formula(), FLOW, "x0"))
    optimizer = torch.optim.SGD([network.c], lr=2.0)
    for iteration in range(150):
        with players.turn("generator"):
            optimizer.zero_grad()
            given = Batch(Condition(), (4,), tuple(range(count + 1)))
            method.generator_loss(players, given, rng(size=count + 1, iteration=iteration)).total.backward()
            optimizer.step()
    wanted = recursion(FLOW, count, solver)
    assert float(network.c[0]) == pytest.approx(wanted, abs=1e-3)
    assert abs(wanted - SPREAD) > 0.02


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 2}, "num_steps must be 1, got 2: for more steps take --method dmd2 or sid"),
        ({"step": 1.0}, "step must be in"),
        ({"step": math.nan}, "step must be in"),
        ({"ends": 0.5}, "ends must be in"),
        ({"power": 3.0}, "power must be in"),
        ({"floor": 0.0}, "floor"),
        ({"guidance": -1.0}, "guidance"),
        ({"solver": "euler"}, "no solver 'euler'; allowed: ddim, heun"),
        ({"first_time": 2.0}, "got \\[2.0\\]"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BOOT(**wrong)
