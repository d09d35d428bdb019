"""MeanFlow: the identity in closed form, the loss by hand, sampling as jumps, and what its derivative needs."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, VPTable, directional_derivative, few_step, match
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.trio import Trio
from fewstep.objectives.meanflow import FLOW, MeanFlow, average_velocity, ends
from fewstep.objectives.rollout import told
from fewstep.types import Batch, Condition, Real
from tests.affine import Affine, batch, rng

SCHEDULES = {"flow": RectifiedFlow(), "vp": VPTable.scaled_linear(), "edm": EDM()}
MEAN, SPREAD = 0.7, 0.5


def variance(t):
    return (1 - t) ** 2 * SPREAD**2 + t**2


def velocity(z, t):
    """v of N(MEAN, SPREAD^2) on rectified flow."""
    return -MEAN + (t - (1 - t) * SPREAD**2) / variance(t) * (z - (1 - t) * MEAN)


def average(z, r, t):
    """Its exact average from t to r."""
    ended = (1 - r) * MEAN + (variance(r) / variance(t)).sqrt() * (z - (1 - t) * MEAN)
    return (z - ended) / (t - r)


class Exact(Backbone):
    """A rectified flow network that answers with the exact average velocity."""

    def __init__(self):
        super().__init__(nn.Linear(1, 1).requires_grad_(False))

    @property
    def extras(self):
        return frozenset({"until"})

    @property
    def dtype(self):
        return torch.float64

    def network_time(self, t):
        return t.double()

    def forward(self, x, network_time, cond):
        t, r = (time.double()[:, None, None, None] for time in (network_time, cond.extra["until"]))
        return torch.where(t == r, velocity(x, t), average(x, r.clamp_max(t - 1e-12), t))


class Net(Backbone):
    """x0 = w x sin(k t) + b until + g x^2: everything that it reads, it uses."""

    def __init__(self, w=0.5, b=0.3):
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
        self.seen.append((network_time.detach().clone(), until.detach().clone()))
        time, until = (v[:, None, None, None] for v in (network_time, until))
        return self.w * x * torch.sin(2 * time) + self.b * until + 0.1 * x.square()


def real_batch(size=6):
    made = batch(size)
    x0 = torch.randn(size, 1, 4, 3, generator=torch.Generator().manual_seed(7))
    return Batch(made.cond, made.shape, made.sample_ids, real=Real(x0, made.cond))


def players(schedule=FLOW, network=None):
    teacher = Denoiser(Affine(0.3, 0.2), schedule, "x0")
    return Trio(generator=Denoiser(network or Net(), schedule, "x0"), real_score=teacher)


def test_the_exact_average_of_a_gaussian_satisfies_the_identity():
    """u = v - (t - r) du/dt along (v, 0, 1), in float64.  Fails with the sign turned, or with r moved too."""
    z = torch.linspace(-2, 2, 6, dtype=torch.float64)[:, None]
    t = torch.tensor([0.2, 0.4, 0.5, 0.7, 0.9, 1.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.1, 0.45, 0.2, 0.0, 0.0], dtype=torch.float64)
    v = velocity(z, t[:, None])
    f = lambda z, t: average(z, r[:, None], t[:, None])  # noqa: E731
    u, du = directional_derivative(f, (z, t), (v, torch.ones_like(t)))
    assert_close(u, v - (t - r)[:, None] * du, atol=1e-10, rtol=1e-10)


def test_one_step_of_the_exact_average_has_the_datas_spread():
    """z - u(z, 0, 1) = MEAN + SPREAD z."""
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)
    zero, one = torch.zeros_like(z), torch.ones_like(z)
    assert_close(z - average(z, zero, one), MEAN + SPREAD * z)


def test_the_exact_average_has_no_loss():
    """The identity through the whole objective: its target is what the exact student says."""

    class Teacher(Affine):
        def forward(self, x, network_time, cond):
            return velocity(x.double(), network_time.double()[:, None, None, None])

    trio = Trio(generator=Denoiser(Exact(), FLOW, "flow"), real_score=Denoiser(Teacher(0.0, 0.0), FLOW, "flow"))
    loss = MeanFlow(guidance=1.0, instant=0.3).generator_loss(trio, real_batch(), rng())
    assert float(loss.metrics["meanflow/mse"]) < 1e-9
    assert float(loss.metrics["meanflow/du_rms"]) > 0.1


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_few_step_sampler_jumps_along_the_average_velocity(name, steps):
    """Its states are z_r = z - (t - r) u of rectified flow, by equal noise, whatever the network.

    Fails if the sampler draws fresh noise, or if u is read of another time than the sampler tells.
    """
    schedule, method = SCHEDULES[name], MeanFlow(num_steps=steps)
    student = Denoiser(Net().double(), schedule, "x0")
    eps = torch.randn(6, 1, 4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    grid, cond, seen = method.sampler.grid(schedule), Condition(), []

    def step(x, t):
        seen.append(x)
        return student(x, t, told(student, cond, x, grid, len(seen) - 1, torch.randn_like)).x0

    x0 = few_step(step, method.sampler.begin(eps, schedule), grid, schedule, draw=None)
    times, scale = match(grid.double(), schedule, FLOW)
    z = seen[0] * scale[0]
    for k, t in enumerate(times):
        assert_close(seen[k] * scale[k], z, atol=1e-5, rtol=1e-5)
        r = times[k + 1] if k + 1 < steps else torch.zeros((), dtype=torch.float64)
        u = average_velocity(student, r.expand(6), cond)(z, t.expand(6))
        z = z - (t - r) * u
    assert_close(x0, z, atol=1e-5, rtol=1e-5)
    assert method.sampler.stochastic is False


@pytest.mark.parametrize("source", ["teacher", "data"])
def test_the_loss_by_hand(source):
    """Fails if the target moves the other way, if its derivative leaves out the time, or if w has a gradient."""
    method, trio, given = MeanFlow(velocity=source, guidance=1.0, instant=0.3, power=0.5), players(), real_batch()
    with trio.turn("generator"):
        loss = method.generator_loss(trio, given, rng())
        loss.total.backward()
    network = trio.generator.backbone
    t, r = method.times(rng(), FLOW, torch.device("cpu"))
    x0, cond = given.real
    eps = rng().randn_like(x0, "meanflow.eps")
    t_, r_ = (v[:, None, None, None] for v in (t, r))
    z = (1 - t_) * x0 + t_ * eps
    v = eps - x0 if source == "data" else (z - trio.real_score(z, t, cond).x0) / t_

    def u(z, t_):
        return (z - (network.w * z * torch.sin(2 * t_) + network.b * r_ + 0.1 * z.square())) / t_

    h = 1e-5
    with torch.no_grad():
        wide = [value.double() for value in (z, t_, v)]
        du = (u(wide[0] + h * wide[2], wide[1] + h) - u(wide[0] - h * wide[2], wide[1] - h)) / (2 * h)
    error = (u(z, t_) - (v - (t_ - r_) * du.float())).square().flatten(1).sum(1)
    wanted = (error / (error.detach() + 1e-3).sqrt()).mean()
    assert_close(loss.total.detach(), wanted.detach(), atol=1e-4, rtol=1e-4)
    grads = [p.grad for p in (network.w, network.b)]
    assert_close(grads, list(torch.autograd.grad(wanted, [network.w, network.b])), atol=1e-3, rtol=1e-3)
    assert all(p.grad is None for p in trio.real_score.parameters())


def test_guidance_is_the_teachers_and_its_velocity_is_the_path_of_the_derivative():
    found = []
    for guidance in (1.0, 3.0):
        point = MeanFlow(guidance=guidance).point(players(), real_batch(), rng())
        found.append(point.v)
    prompt = real_batch().cond.tensors["prompt"][:, :, None, None]
    assert_close(found[1] - found[0], -0.2 * prompt / point.t[:, None, None, None] * torch.ones(1, 1, 4, 3))


def test_times_are_ordered_and_three_quarters_are_instants():
    method, size = MeanFlow(), 20_000
    t, r = method.times(rng(size=size), FLOW, torch.device("cpu"))
    assert (r <= t).all() and (r == t).double().mean() == pytest.approx(0.75, abs=0.01)
    assert torch.logit(t[r == t].double()).mean() == pytest.approx(-0.4 + 0.5642, abs=0.03)  # the larger of two normals


@pytest.mark.parametrize("name", ["vp", "edm"])
def test_a_network_is_told_its_own_times_and_the_cleanest_of_them_means_data(name):
    """Fails if it is told rectified flow's."""
    schedule, trio = SCHEDULES[name], players(SCHEDULES[name])
    method = MeanFlow(guidance=1.0, instant=0.0, time_std=4.0)
    method.generator_loss(trio, real_batch(64), rng(size=64))
    t, r = method.times(rng(size=64), schedule, torch.device("cpu"))
    time, until = trio.generator.backbone.seen[0]
    for told_time, flow_time in ((time, t), (until, r)):
        inner = (told_time > 0.01) & (told_time < 0.999)
        c, flow = schedule.at(told_time[inner].double()), FLOW.at(flow_time[inner].double())
        assert_close(c.log_snr, flow.log_snr, atol=2e-3, rtol=2e-3)
    low, high = ends(schedule)
    assert (r == 0).any() and ((r == 0) | (r > low)).all() and (until[r == 0] == 0).all()
    assert t.min() >= low - 1e-6 and t.max() <= high + 1e-6


def test_probe_finds_a_time_that_has_lost_its_derivative():
    class Cut(Net):
        def forward(self, x, network_time, cond):
            return super().forward(x, network_time.detach(), cond)

    method = MeanFlow(guidance=1.0)
    method.probe(players(), real_batch(2), rng(size=2))
    with pytest.raises(RuntimeError, match="the time"):
        method.probe(players(network=Cut()), real_batch(2), rng(size=2))


def test_at_the_start_the_average_is_the_teachers_velocity():
    """Right where r = t, so that only the way beyond has to be learnt."""
    from fewstep.teachers import gaussian as teacher_of

    teacher = teacher_of(fit_steps=2)
    assert teacher.student is not None
    network, method = teacher.student(), MeanFlow(guidance=1.0)
    trio = Trio.build(network, method.roles, student=lambda make: method.student(make, 0))
    z, cond = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), teacher.encode([""] * 5)
    t = torch.linspace(0.1, 0.9, 5)
    for r in (torch.zeros(5), 0.5 * t, t):
        assert_close(average_velocity(trio.generator, r, cond)(z, t), network(z, t, cond).flow, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"instant": 1.0}, "instant must be in"),
        ({"power": -1.0}, "power must be"),
        ({"constant": 0.0}, "constant"),
        ({"velocity": "student"}, "no velocity 'student'; allowed: teacher, data"),
        ({"derivative": "backward"}, "no derivative 'backward'"),
        ({"velocity": "data"}, "guidance 3.0 has no effect; give 1"),
    ],
)
def test_bad_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MeanFlow(**wrong)


def test_a_batch_without_data_is_refused():
    with pytest.raises(ValueError, match="real latents"):
        MeanFlow().generator_loss(players(), batch(), rng())
