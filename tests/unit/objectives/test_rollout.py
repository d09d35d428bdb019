"""Backward simulation (T11 of the DMD family's catalogue)."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, VPTable
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.objectives.rollout import StudentSampler, backward_simulation
from fewstep.rng import Rng
from fewstep.types import Batch, Condition

SCHEDULES = {"flow": RectifiedFlow(), "vp": VPTable.scaled_linear(), "edm": EDM()}


class Recorder(Backbone):
    """Answers x0 = q with one parameter, and remembers what it was asked."""

    def __init__(self, q: float) -> None:
        super().__init__(nn.Linear(1, 1))
        self.q = nn.Parameter(torch.tensor(q))
        self.seen: list[tuple[torch.Tensor, torch.Tensor, bool]] = []

    def network_time(self, t):
        return t

    def forward(self, x, network_time, cond):
        self.seen.append((x.detach().clone(), network_time.clone(), torch.is_grad_enabled()))
        return self.q * torch.ones_like(x)


def roll(schedule, iteration, num_steps, *, stochastic=True, size=400, ids=None):
    net = Recorder(0.7)
    generator = Denoiser(net, schedule, "x0")
    ids = range(size) if ids is None else ids
    batch = Batch(Condition(), (5,), tuple(ids))
    rollout = backward_simulation(
        generator, batch, Rng(0, iteration, "generator", tuple(ids)), StudentSampler(num_steps, stochastic)
    )
    return net, rollout


def rolls_by_step(schedule, num_steps, **options):
    """One rollout of every step index (the index is random by iteration)."""
    found = {}
    for iteration in range(60):
        net, rollout = roll(schedule, iteration, num_steps, **options)
        found.setdefault(rollout.step, (net, rollout))
        if len(found) == num_steps:
            return found
    raise AssertionError(f"only steps {sorted(found)} were drawn in 60 iterations")


def test_four_vp_steps_are_dmd2s():
    indices = StudentSampler(4).grid(VPTable.scaled_linear()) * 999
    assert indices.round().tolist() == [999, 749, 499, 249]
    assert StudentSampler(4).grid(RectifiedFlow()).tolist() == [1, 0.75, 0.5, 0.25]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_trained_step_sees_the_students_own_noised_sample(name):
    """T11: the input of step k has mean alpha q and spread sigma.  Fails if real data are noised instead."""
    schedule = SCHEDULES[name]
    for step, (net, _) in rolls_by_step(schedule, 4).items():
        x, t, _ = net.seen[-1]
        at = schedule.at(t[:1])
        alpha, sigma = (at.alpha.item(), at.sigma.item()) if step else (0.0, schedule.prior(torch.ones(1)).item())
        # 2000 normals: the standard errors are sigma / 45 and sigma / 63; five of them are allowed.
        assert x.mean().item() == pytest.approx(alpha * 0.7, abs=sigma / 9)
        assert x.std().item() == pytest.approx(sigma, rel=0.08)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_is_pure_noise_independent_of_the_generator(name):
    """At t = 1 the input is prior(eps), without alpha x0 even where alpha is not 0 (VP: .068)."""
    schedule = SCHEDULES[name]
    net, rollout = rolls_by_step(schedule, 4)[0]
    assert len(net.seen) == 1 and rollout.step == 0
    noise = Rng(0, 0, "generator", (0,)).randn("rollout.noise", (5,))
    single, _ = roll(schedule, 0, 1, size=1)
    assert_close(single.seen[0][0], schedule.prior(noise))


def test_only_the_last_step_has_gradient():
    """Fails if the prefix is not under no_grad: memory would grow with the steps and gradients would differ."""
    for step, (net, rollout) in rolls_by_step(RectifiedFlow(), 4).items():
        assert [grad for *_, grad in net.seen] == [False] * step + [True]
        rollout.x.sum().backward()
        assert net.q.grad.item() == pytest.approx(rollout.x.numel())


def test_the_critics_rollout_has_no_gradient_at_all():
    with torch.no_grad():
        net, rollout = roll(RectifiedFlow(), 0, 4)
    assert not rollout.x.requires_grad and not any(grad for *_, grad in net.seen)


def test_every_sample_and_every_rank_takes_the_same_step():
    """Fails if the index is keyed by sample: ranks would disagree and wait for each other for ever."""
    steps = {roll(RectifiedFlow(), 7, 8, ids=ids)[1].step for ids in ((0, 1), (2, 3), (1000,))}
    assert len(steps) == 1


def test_each_step_is_drawn_equally_often():
    counts = torch.bincount(
        torch.tensor([roll(RectifiedFlow(), i, 4, size=1)[1].step for i in range(400)]), minlength=4
    )
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; four of them are allowed.
    assert ((counts - 100).abs() < 35).all()


def test_deterministic_renoising_keeps_the_noise():
    """x_t' = alpha' x0 + sigma' eps with the eps that x_t holds: on rectified flow an Euler step."""
    net, _ = rolls_by_step(RectifiedFlow(), 2, stochastic=False)[1]
    (first, _, _), (second, _, _) = net.seen
    assert_close(second, 0.5 * 0.7 + 0.5 * first)


def test_a_second_rollout_in_one_turn_needs_streams_of_its_own():
    """Fails with fixed names: a method with two graphs could not draw its second rollout."""
    generator = Denoiser(Recorder(0.7), RectifiedFlow(), "x0")
    batch, rng = Batch(Condition(), (5,), (0, 1)), Rng(0, 0, "generator", (0, 1))
    backward_simulation(generator, batch, rng, StudentSampler(1))
    with pytest.raises(ValueError, match="drawn already"):
        backward_simulation(generator, batch, rng, StudentSampler(1))
    backward_simulation(generator, batch, rng, StudentSampler(1), stream="second")
    first, second = (seen[0] for seen in (generator.backbone.seen[0], generator.backbone.seen[-1]))
    assert not torch.equal(first, second)


def test_the_first_step_may_be_told_an_earlier_time():
    """SDXL in one step: index 399, unit noise, x0 = (z - s_399 eps) / a_399.  Fails if z is scaled to that level."""
    schedule = VPTable.scaled_linear()
    assert (StudentSampler(1, first=0.4).grid(schedule) * 999).round().tolist() == [399]
    assert (StudentSampler(4, first=0.9).grid(schedule) * 999).round().tolist() == [899, 749, 499, 249]
    assert StudentSampler(1, first=0.4).grid(RectifiedFlow()).tolist() == pytest.approx([0.4])
    for steps, told in ((2, [599, 499]), (4, [799, 749, 499, 249])):  # with room above the second step
        assert (StudentSampler(steps, first=0.4).grid(schedule) * 999).round().tolist() == told

    class Eps(Recorder):
        def forward(self, x, network_time, cond):
            super().forward(x, network_time, cond)
            return self.q * x

    generator = Denoiser(Eps(0.5), schedule, "eps")
    ids = (0, 1)
    made = backward_simulation(
        generator, Batch(Condition(), (5,), ids), Rng(0, 0, "generator", ids), StudentSampler(1, first=0.4)
    )
    z, told, _ = generator.backbone.seen[0]
    assert torch.equal(z, Rng(0, 0, "generator", ids).randn("rollout.noise", (5,)))
    c = schedule.at(torch.tensor([399 / 999]))
    assert_close(told, torch.full((2,), 399 / 999))
    assert_close(made.x.detach(), (z - c.sigma * 0.5 * z) / c.alpha, rtol=1e-5, atol=1e-6)
    assert c.alpha.item() == pytest.approx(0.653, abs=1e-3)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_student_that_starts_lower_gets_that_levels_noise_alone(name):
    """sigma(t0) eps: on VP .929 eps.  Fails with unit noise there, with prior(eps) on EDM (80 eps), or with data."""
    schedule = SCHEDULES[name]
    generator = Denoiser(Recorder(0.7), schedule, "x0")
    for steps in (1, 4):
        sampler = StudentSampler(steps, start=2.5)
        for iteration in range(6):
            made = Rng(0, iteration, "generator", (0, 1))
            backward_simulation(generator, Batch(Condition(), (5,), (0, 1)), made, sampler)
            backbone = generator.backbone
            noise = Rng(0, iteration, "generator", (0, 1)).randn("rollout.noise", (5,))
            (first, told, _), backbone.seen = backbone.seen[0], []
            at = schedule.at(told[:1])
            assert (at.sigma / at.alpha).item() == pytest.approx(2.5, rel=2e-3)
            assert_close(first, at.sigma.item() * noise)
            if name == "vp":
                assert (told * 999).tolist() == [625, 625] and at.sigma.item() == pytest.approx(0.9286, abs=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_step_of_the_linear_optimum_gives_the_datas_spread(name):
    """x0 = g x_t with g s = S at the first level and g^2 (a^2 S^2 + s^2) = S^2 at the others keeps N(0, S^2).  Fails if
    step noise is the first noise again, or scaled otherwise than the input of the first step."""
    schedule, spread = SCHEDULES[name], 0.5
    start = StudentSampler(4, start=2.5).grid(schedule)[0]

    class Linear(Recorder):
        def forward(self, x, network_time, cond):
            c = schedule.at(network_time).like(x)
            data = torch.where(network_time == start, 0.0, spread)[:, None]
            return self.q / 0.7 * spread / (c.alpha**2 * data**2 + c.sigma**2).sqrt() * x

    generator, ids = Denoiser(Linear(0.7), schedule, "x0"), tuple(range(50))
    seen = set()
    for iteration in range(12):
        batch, draws = Batch(Condition(), (400,), ids), Rng(0, iteration, "generator", ids)
        x, step = backward_simulation(generator, batch, draws, StudentSampler(4, start=2.5))
        seen.add(step)
        assert x.std().item() == pytest.approx(spread, rel=0.025)  # 20 000 normals: 0.5%, five of them
    assert seen == {0, 1, 2, 3}
