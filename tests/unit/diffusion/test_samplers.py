import math
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import (
    EDM,
    Prediction,
    RectifiedFlow,
    TrigFlow,
    VPTable,
    few_step,
    ode,
    student_grid,
    time_grid,
    trajectory,
)
from fewstep.types import Condition

EVERYONE = Condition()
TWO = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # the exact flow of a Gaussian is affine: two points tell all


def test_grids_descend_from_noise_through_the_shift():
    assert_close(time_grid(4), torch.tensor([1, 0.75, 0.5, 0.25]))
    assert_close(time_grid(4, 5.0), torch.tensor([1, 0.9375, 5 / 6, 0.625]))
    assert_close(time_grid(2, 3.0, clean_end=True), torch.tensor([1, 0.75, 0]))


def test_student_grids_of_tables_are_dmd2s_indices():
    """999, 749, 499, 249. Fails with t = k / N, times that a table network was never trained at."""
    for schedule in (VPTable.scaled_linear(), EDM()):
        assert (student_grid(schedule, 4) * 999).tolist() == [999, 749, 499, 249]
    assert_close(student_grid(RectifiedFlow(), 4, shift=3.0), torch.tensor([1, 0.9, 0.75, 0.5]))


def test_student_grid_of_every_index_keeps_every_index():
    """Fails when floored without a margin: 748 / 999 * 999 is 747.99."""
    assert (student_grid(VPTable.scaled_linear(), 999) * 999).tolist() == list(range(999, 0, -1))


def test_student_grids_may_start_at_a_noise_level():
    """SiD's 2.5: indices 625, 468, 312, 156, and 625, 312. Fails if sigma is taken for sigma / alpha (513 on VP), or if
    the first index is rounded down (624)."""
    vp = VPTable.scaled_linear()
    assert (student_grid(vp, 4, start=2.5) * 999).tolist() == [625, 468, 312, 156]
    assert (student_grid(vp, 2, start=2.5) * 999).tolist() == [625, 312]
    assert (student_grid(vp, 625, start=2.5) * 999).round().tolist() == list(range(625, 0, -1))
    assert student_grid(RectifiedFlow(), 4, start=2.5).tolist() == pytest.approx([0.714, 0.536, 0.357, 0.179])
    edm = EDM().at(student_grid(EDM(), 2, start=2.5)).sigma
    assert edm[0].item() == pytest.approx(2.5, rel=2e-3)  # the nearest of 1000 levels
    shifted = student_grid(RectifiedFlow(), 2, start=2.5, shift=3.0)
    assert shifted.tolist() == pytest.approx([0.714, 0.536])  # .714 times 1 and .75


def test_student_grids_refuse_levels_that_the_schedule_lacks():
    """Fails if they are clamped: the student would start at another level than it was told."""
    for schedule, start in ((VPTable.scaled_linear(), 20.0), (EDM(), 100.0), (EDM(), 1e-3), (RectifiedFlow(), 0.0)):
        with pytest.raises(ValueError, match=f"no sigma / alpha = {start}"):
            student_grid(schedule, 1, start=start)
    with pytest.raises(ValueError, match="leave one out"):
        student_grid(EDM(), 1, start=2.5, first=0.4)
    with pytest.raises(ValueError, match="strictly descending"):
        student_grid(VPTable.scaled_linear(), 700, start=2.5)


def spying(schedule, point, seen):
    """A perfect student of a point mass; `seen` collects its inputs."""

    def step(x_t, t):
        seen.append((x_t, t))
        return torch.full_like(x_t, point)

    return step


def test_few_step_with_a_perfect_student_keeps_its_noise(schedule):
    """Deterministic: x_{t_k} = alpha q + sigma eps, one eps throughout. Fails if eps is scaled by the next sigma."""
    seen, grid = [], torch.tensor([0.9, 0.6, 0.3])
    noise = schedule.prior(torch.tensor([[0.3, -1.1], [0.7, 2.0], [-0.4, 0.1]]))
    assert torch.equal(few_step(spying(schedule, 1.5, seen), noise, grid, schedule), torch.full((3, 2), 1.5))
    implied = [Prediction(torch.full((3, 2), 1.5), x_t, t, "x0", schedule).eps for x_t, t in seen]
    for later in implied[1:]:
        assert_close(later, implied[0], atol=2e-5, rtol=2e-5)


def test_few_step_tells_the_student_its_grid_as_float32_per_sample(schedule):
    seen, grid = [], torch.tensor([1.0, 0.75, 0.25], dtype=torch.float64)
    few_step(spying(schedule, 0.0, seen), torch.ones(4, 2), grid, schedule)
    assert [t.tolist() for _, t in seen] == [[1.0] * 4, [0.75] * 4, [0.25] * 4]
    assert {t.dtype for _, t in seen} == {torch.float32}


def test_stochastic_few_step_enters_each_step_with_fresh_noise(schedule):
    """T11: the state entering step k has mean alpha q, variance sigma^2, and noise unrelated to the last step's.

    n = 40 000: a mean is good to .005 sigma, a standard deviation to .0035 sigma, a correlation to .005; 5 of each.
    Fails if the first step's noise is re-used, or if x0 is not scaled by alpha.
    """
    seen, grid, q, n = [], torch.tensor([1.0, 0.7, 0.4]), 0.8, 40_000
    generator = torch.Generator().manual_seed(0)
    noise = schedule.prior(torch.randn(n, 1, generator=generator))
    few_step(
        spying(schedule, q, seen), noise, grid, schedule, draw=lambda k, x: torch.randn(x.shape, generator=generator)
    )
    states = [x_t for x_t, _ in seen]
    for x_t, t in seen[1:]:
        c = schedule.at(t[:1])
        assert abs(x_t.mean() - c.alpha * q) < 0.025 * c.sigma
        assert abs(x_t.std() / c.sigma - 1) < 0.018
    assert torch.corrcoef(torch.cat(states, 1).T).triu(1).abs().max() < 0.025


def test_draw_is_asked_once_before_each_later_step(schedule):
    asked = []

    def draw(k, x0):
        asked.append(k)
        return torch.zeros_like(x0)

    few_step(lambda x_t, t: x_t, torch.ones(2, 1), time_grid(4), schedule, draw=draw)
    assert asked == [1, 2, 3]


def test_deterministic_few_step_is_euler_on_rectified_flow(gaussian):
    denoiser = gaussian(RectifiedFlow())
    noise, times = torch.tensor([[0.4], [-1.3]]), [1.0, 0.6, 0.2, 0.0]
    x = noise
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * denoiser(x, torch.full((2,), t), EVERYONE).flow
    student = few_step(lambda x_t, t: denoiser(x_t, t, EVERYONE).x0, noise, torch.tensor(times[:-1]), RectifiedFlow())
    assert_close(student, x, atol=2e-6, rtol=0)


def test_few_step_leaves_gradients_to_its_caller(schedule):
    """Each step's own parameter gets one. Fails under a no_grad around any step."""
    scales = [torch.tensor(0.5, requires_grad=True) for _ in range(3)]
    left = iter(scales)
    few_step(
        lambda x_t, t: next(left) * x_t, torch.ones(2, 1), torch.tensor([0.9, 0.5, 0.2]), schedule
    ).sum().backward()
    assert all(scale.grad is not None and scale.grad != 0 for scale in scales)


def exact_end(denoiser, noise):
    """Where the exact flow takes noise: a Gaussian's states keep their z-score. On a table, then the posterior mean."""
    m, std = denoiser.mean, denoiser.std
    c = denoiser.schedule.at(torch.tensor([1.0, 0.0], dtype=torch.float64))
    spread = (c.alpha**2 * std**2 + c.sigma**2).sqrt()
    x_0 = c.alpha[1] * m + spread[1] / spread[0] * (noise - c.alpha[0] * m)
    return m + c.alpha[1] * std**2 / spread[1] ** 2 * (x_0 - c.alpha[1] * m)


def error(denoiser, method, steps):
    noise = denoiser.schedule.prior(TWO)
    end = ode(denoiser, noise, time_grid(steps, clean_end=True), EVERYONE, method=method)
    return (end - exact_end(denoiser, noise)).abs().max().item()


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_ode_converges_to_the_exact_flow_at_its_order(schedule, gaussian, method, order):
    """Halving the step divides the error by 2^order; 0.75 of it allows the next order's term.

    Fails (heun) if the second slope is taken at the old time, or (tables) if the last x0 is not predicted.
    """
    coarse, fine = (error(gaussian(schedule), method, steps) for steps in (40, 80))
    assert fine < 0.03
    assert coarse / fine > 0.75 * 2**order


def test_heun_beats_euler_at_equal_calls(schedule, gaussian):
    assert error(gaussian(schedule), "heun", 40) < 0.5 * error(gaussian(schedule), "euler", 80)


def test_ode_recovers_the_standard_deviation(schedule, gaussian):
    """Within 1.2% of .5 with 40 Heun steps, from unit noise; two points of it are enough, since the map is affine."""
    noise = schedule.prior(TWO)
    low, high = ode(gaussian(schedule), noise, time_grid(40, clean_end=True), EVERYONE)
    # The prior lacks the data's share of the variance at t = 1: alpha^2 .25 against sigma^2, at most .06%.
    assert_close((high - low) / 2, torch.full((1,), 0.5, dtype=torch.float64), atol=0, rtol=0.012)


def test_euler_on_rectified_flow_is_the_flow_matching_step_bit_for_bit(gaussian):
    """x + (t' - t) flow in float32, as FlowMatchEulerDiscreteScheduler. Fails through x0 and eps (1e-7 off)."""
    denoiser, grid = gaussian(RectifiedFlow()), time_grid(7, 3.0, clean_end=True)
    noise = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    x = noise
    for t, t_next in pairwise(grid):
        flow = denoiser(x, t.repeat(50), EVERYONE).flow
        x = x + (t_next - t) * flow
    assert torch.equal(ode(denoiser, noise, grid, EVERYONE, method="euler"), x)


def test_heun_on_edm_is_edms_sampler(gaussian):
    """Algorithm 1 in sigma, without churn, the appended sigma = 0 last. Fails if Heun averages in flow or in our t."""
    denoiser, schedule = gaussian(EDM()), EDM()
    grid, noise = time_grid(6, clean_end=True), schedule.prior(TWO)
    x, sigma = noise, schedule.at(grid.double()).sigma
    for i in range(6):
        d = (x - denoiser(x, grid[i].repeat(2), EVERYONE).x0) / sigma[i]
        x_next = x + (sigma[i + 1] - sigma[i]) * d
        d_next = (x_next - denoiser(x_next, grid[i + 1].repeat(2), EVERYONE).x0) / sigma[i + 1]
        x = x + (sigma[i + 1] - sigma[i]) * (d + d_next) / 2
    expected = denoiser(x, grid[6].repeat(2), EVERYONE).x0
    assert_close(ode(denoiser, noise, grid, EVERYONE, method="heun"), expected, atol=1e-9, rtol=1e-9)


def test_euler_and_ddim_are_the_same_step(schedule, gaussian):
    noise, grid = schedule.prior(TWO), time_grid(5, clean_end=True)
    ends = [ode(gaussian(schedule), noise, grid, EVERYONE, method=method) for method in ("euler", "ddim")]
    assert_close(*ends, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("method", "calls"), [("euler", 5), ("heun", 9)])
def test_ode_onto_clean_data_needs_no_call_there(gaussian, method, calls):
    """Euler N, Heun 2 N - 1: slopes need not exist at sigma = 0."""
    for schedule in (RectifiedFlow(), TrigFlow()):
        denoiser = gaussian(schedule)
        ode(denoiser, schedule.prior(TWO), time_grid(5, clean_end=True), EVERYONE, method=method)
        assert len(denoiser.calls) == calls


def test_ode_of_a_table_ends_by_predicting_x0(gaussian):
    """N + 1 calls, the last at t = 0. Fails if the state at sigma(0) > 0 is returned as if clean."""
    for schedule in (VPTable.scaled_linear(), EDM()):
        denoiser = gaussian(schedule)
        end = ode(denoiser, schedule.prior(TWO), time_grid(5, clean_end=True), EVERYONE, method="euler")
        x_t, t, cond = denoiser.calls[-1]
        assert [call[1][0].item() for call in denoiser.calls] == time_grid(5, clean_end=True).tolist()
        assert torch.equal(end, denoiser(x_t, t, cond).x0)


def test_ode_that_stops_early_returns_the_state(schedule, gaussian):
    """The marginal's spread at t = .5, not x0's. 60 Heun steps: within 1%."""
    grid = 1 - torch.linspace(0, 0.5, 61)
    low, high = ode(gaussian(schedule), schedule.prior(TWO), grid, EVERYONE)
    c = schedule.at(torch.tensor([0.5], dtype=torch.float64))
    assert_close((high - low) / 2, (c.alpha**2 * 0.25 + c.sigma**2).sqrt(), atol=0, rtol=0.01)


def test_ode_guides(gaussian):
    denoiser = gaussian(RectifiedFlow())
    cond = Condition({"class": torch.tensor([0, 1])}, {"class": torch.tensor([-1])})
    ode(denoiser, TWO, time_grid(2, clean_end=True), cond, method="euler", guidance=3.0)
    assert [call[2].tensors["class"].tolist() for call in denoiser.calls] == [[0, 1], [-1, -1]] * 2


def test_ode_records_no_gradient(gaussian):
    noise = TWO.clone().requires_grad_()
    assert not ode(gaussian(RectifiedFlow()), noise, time_grid(2, clean_end=True), EVERYONE).requires_grad


def test_state_is_carried_in_float32_and_returned_in_the_noises_dtype(gaussian):
    """bfloat16 noise walks as its float32 copy does, bit for bit, and the end alone is rounded.

    Fails if the state or the stride is kept in the noise's dtype.
    """
    denoiser, grid = gaussian(RectifiedFlow()), time_grid(7, clean_end=True)
    low, high = (list(trajectory(denoiser, noise, grid, EVERYONE)) for noise in (TWO.bfloat16(), TWO.float()))
    assert all(torch.equal(a.x_t, b.x_t) and torch.equal(a.x_next, b.x_next) for a, b in zip(low, high))
    assert torch.equal(ode(denoiser, TWO.bfloat16(), grid, EVERYONE), high[-1].x_next.bfloat16())


def test_trajectory_is_a_chain_over_the_grid(schedule, gaussian):
    grid = torch.tensor([1.0, 0.6, 0.3, 0.1])
    states = list(trajectory(gaussian(schedule), schedule.prior(TWO), grid, EVERYONE, method="euler"))
    assert [s.t.tolist() for s in states] == [[t] * 2 for t in grid[:-1].tolist()]
    assert [s.t_next.tolist() for s in states] == [[t] * 2 for t in grid[1:].tolist()]
    assert torch.equal(states[0].x_t, schedule.prior(TWO))
    assert all(torch.equal(a.x_next, b.x_t) for a, b in pairwise(states))
    assert all(torch.equal(s.prediction.x_t, s.x_t) for s in states)


def test_trajectory_stays_on_the_exact_curve(gaussian):
    """Rectified flow, N(1.5, .5^2): x_t = alpha m + spread_t z, here within .002 over 100 Heun steps."""
    denoiser, schedule = gaussian(RectifiedFlow()), RectifiedFlow()
    for state in trajectory(denoiser, TWO, time_grid(100, clean_end=True), EVERYONE):
        c = schedule.at(state.t.double())
        expected = (c.alpha * 1.5 + (c.alpha**2 * 0.25 + c.sigma**2).sqrt() * TWO[:, 0])[:, None]
        assert_close(state.x_t, expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("grid", [[0.5, 1.0], [1.0, 0.5, 0.5], [999.0, 0.0], [1.0], [1.0, math.nan]])
def test_impossible_grids_are_refused(gaussian, grid):
    with pytest.raises(ValueError, match="strictly descending times"):
        ode(gaussian(RectifiedFlow()), TWO, torch.tensor(grid), EVERYONE)


def test_an_unknown_method_is_refused(gaussian):
    with pytest.raises(ValueError, match="no sampling method 'rk4'; known: euler, heun, ddim"):
        ode(gaussian(RectifiedFlow()), TWO, time_grid(2), EVERYONE, method="rk4")  # type: ignore[arg-type]
