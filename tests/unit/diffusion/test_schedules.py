import itertools
import pickle

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, TrigFlow, VPTable, like, match

PAIRS = list(itertools.permutations(["vp", "flow", "edm", "trig"], 2))
INSIDE = torch.tensor([0.0705, 0.3505, 0.7005], dtype=torch.float64)  # between table indices, none at an end


def test_stable_diffusion_table_has_the_published_constants():
    """T8 / section 0.1. Fails with `linear` betas, or with t = i / 1000 (at 999: alpha .0687)."""
    t = torch.tensor([20, 249, 399, 499, 749, 999]) / 999
    c = VPTable.scaled_linear().at(t)
    assert_close(c.alpha, torch.tensor([0.991, 0.822, 0.653, 0.527, 0.238, 0.0683]), atol=5e-4, rtol=0)
    assert_close(c.sigma, torch.tensor([0.137, 0.570, 0.758, 0.850, 0.971, 0.9977]), atol=5e-4, rtol=0)
    assert_close(c.alpha[-1], torch.tensor(0.06827), atol=5e-5, rtol=0)


def test_edm_has_dmds_karras_levels():
    """T8: indices 20, 500, 980 of DMD's ascending table. Fails with t = i / 1000 (71.99 at 980) or descending order."""
    sigma = EDM().at(torch.tensor([20, 500, 980]) / 999).sigma
    assert_close(sigma, torch.tensor([0.0032316, 2.5265, 72.0539]), atol=0, rtol=2e-5)


def test_a_table_index_survives_the_float32_round_trip():
    """t = i / 999 times 999 is i again for all 1000. Fails in float64 (748 / 999 * 999 = 747.99...)."""
    index = torch.arange(1000)
    t = (index.double() / 999).float()
    assert torch.equal(t * 999, index.float())


def test_variance_preserving_schedules_preserve_variance():
    for schedule in (VPTable.scaled_linear(), TrigFlow()):
        c = schedule.at(torch.linspace(0, 1, 7, dtype=torch.float64))
        assert_close(c.alpha**2 + c.sigma**2, torch.ones(7, dtype=torch.float64), atol=1e-12, rtol=0)


def test_table_log_snr_is_linear_between_indices():
    table = VPTable((0.9, 0.5, 0.1))
    at = table.at(torch.tensor([0.0, 0.125, 0.5, 0.75, 1.0], dtype=torch.float64)).log_snr
    knots = torch.logit(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    expected = torch.stack([knots[0], 0.75 * knots[0] + 0.25 * knots[1], knots[1], (knots[1] + knots[2]) / 2, knots[2]])
    assert_close(at, expected, atol=1e-12, rtol=0)


def test_flow_and_trig_reach_clean_data_and_pure_noise_exactly():
    """Fails with cos(pi / 2) for TrigFlow's alpha, which leaves 6e-17."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for schedule in (RectifiedFlow(), TrigFlow()):
        c = schedule.at(ends)
        assert c.alpha.tolist() == [1, 0]
        assert c.sigma.tolist() == [0, 1]


def test_derivatives_agree_with_finite_differences(schedule):
    """Central differences, O(h^2). Fails without TrigFlow's pi / 2 or the table's factor 999."""
    h = 1e-5
    c, up, down = schedule.at(INSIDE), schedule.at(INSIDE + h), schedule.at(INSIDE - h)
    assert_close(c.d_alpha, (up.alpha - down.alpha) / (2 * h), atol=1e-6, rtol=1e-6)
    assert_close(c.d_sigma, (up.sigma - down.sigma) / (2 * h), atol=1e-6, rtol=1e-6)


def test_forward_mode_derivatives_pass_through_the_coefficients(schedule):
    """Consistency objectives differentiate by t. Fails if the table's position is detached."""

    def curve(t):
        return schedule.at(t).alpha, schedule.at(t).sigma

    _, (d_alpha, d_sigma) = torch.func.jvp(curve, (INSIDE,), (torch.ones_like(INSIDE),))
    c = schedule.at(INSIDE)
    assert_close((d_alpha, d_sigma), (c.d_alpha, c.d_sigma), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("given", "returned"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_coefficients_are_float32_or_better(schedule, given, returned):
    c = schedule.at(torch.tensor([0.25, 0.5]).to(getattr(torch, given)))
    assert {c.alpha.dtype, c.sigma.dtype, c.d_alpha.dtype, c.d_sigma.dtype} == {getattr(torch, returned)}


def test_integer_time_is_refused(schedule):
    with pytest.raises(ValueError, match="index i is i / 999"):
        schedule.at(torch.tensor([20, 980]))


def test_scalar_time_is_refused(schedule):
    with pytest.raises(ValueError, match=r"\[B\]"):
        schedule.at(torch.tensor(0.5))


def test_add_noise_is_per_sample_when_batch_equals_width(schedule, draw):
    """B = W = 3. Fails if `like` returns value unreshaped, which then multiplies columns."""
    x0, eps, t = draw(seed=1, shape=(3, 2, 5, 3))
    c = schedule.at(t)
    by_hand = torch.stack([c.alpha[i] * x0[i] + c.sigma[i] * eps[i] for i in range(3)])
    assert torch.equal(schedule.add_noise(x0, eps, t), by_hand)


def test_like_refuses_one_value_for_several_samples():
    """Fails if `like` leaves size 1 to broadcasting: the whole batch would share one time."""
    with pytest.raises(ValueError, match="one value per sample"):
        like(torch.ones(1), torch.ones(3, 2))


def test_add_noise_sums_in_float32_and_answers_in_x0s_dtype(draw):
    """Fails if alpha and sigma are cast to bfloat16 before the sum."""
    x0, eps, t = draw(seed=2, dtype=torch.bfloat16)
    x_t = EDM().add_noise(x0, eps, t)
    assert x_t.dtype == torch.bfloat16
    assert torch.equal(x_t, EDM().add_noise(x0.float(), eps.float(), t).bfloat16())


@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.3, 0.7), (0.7, 1.0), (0.0, 1.0)])
def test_noising_to_s_then_to_t_is_noising_to_t(schedule, s, t):
    """T12: alpha_ts alpha_s = alpha_t; alpha_ts^2 sigma_s^2 + sigma_ts^2 = sigma_t^2."""
    s, t = torch.tensor([s], dtype=torch.float64), torch.tensor([t], dtype=torch.float64)
    first, step, whole = schedule.at(s), schedule.between(s, t), schedule.at(t)
    assert_close(step.alpha * first.alpha, whole.alpha, atol=1e-12, rtol=1e-9)
    assert_close((step.alpha * first.sigma) ** 2 + step.sigma**2, whole.sigma**2, atol=1e-12, rtol=1e-9)


def test_two_renoisings_are_one(schedule):
    """As distributions, r -> s -> t equals r -> t: factors multiply, variances add."""
    r, s, t = (torch.tensor([v], dtype=torch.float64) for v in (0.2, 0.45, 0.9))
    rs, st, rt = schedule.between(r, s), schedule.between(s, t), schedule.between(r, t)
    assert_close(rs.alpha * st.alpha, rt.alpha, atol=1e-12, rtol=1e-9)
    assert_close((st.alpha * rs.sigma) ** 2 + st.sigma**2, rt.sigma**2, atol=1e-12, rtol=1e-9)


def test_renoise_keeps_the_sample_where_t_equals_s(schedule, draw):
    """Also at both ends, where the plain formula gives 0 / 0 or inf - inf. Fails without the `same` branches."""
    x, eps, _ = draw(seed=3)
    t = torch.tensor([0.0, 0.4, 1.0])
    assert torch.equal(schedule.renoise(x, eps, t, t), x)


def test_renoise_applies_the_step_per_sample(schedule, draw):
    x, eps, _ = draw(seed=4, shape=(3, 2, 5, 3))
    s, t = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.2, 0.3, 0.9])
    c = schedule.between(s, t).to(torch.float32)
    by_hand = torch.stack([c.alpha[i] * x[i] + c.sigma[i] * eps[i] for i in range(3)])
    assert_close(schedule.renoise(x, eps, s, t), by_hand, atol=0, rtol=0)


def test_renoise_refuses_less_noise(schedule, draw):
    """One sample out of order is enough. Fails with .all() instead of .any(), or with a clamped variance."""
    x, eps, _ = draw()
    with pytest.raises(ValueError, match="only adds noise"):
        schedule.renoise(x, eps, torch.tensor([0.1, 0.5, 0.5]), torch.tensor([0.2, 0.4, 0.6]))


def test_flow_renoise_variance_keeps_its_digits_for_close_times():
    """Against the factored form sqrt((t - s)(t + s - 2 t s)) / (1 - s).

    Fails as sigma_t^2 - alpha_ts^2 sigma_s^2 in float32, which is wrong by percents at t - s = 1e-6.
    """
    s = torch.tensor([0.5, 0.8])
    t = s + torch.tensor([1e-6, 1e-4])
    s64, t64 = s.double(), t.double()
    expected = ((t64 - s64) * (t64 + s64 - 2 * t64 * s64)).sqrt() / (1 - s64)
    assert_close(RectifiedFlow().between(s, t).sigma, expected, atol=0, rtol=1e-9)


def test_step_derivatives_agree_with_finite_differences(schedule):
    s, h = INSIDE - 0.05, 1e-5
    c, up, down = schedule.between(s, INSIDE), schedule.between(s, INSIDE + h), schedule.between(s, INSIDE - h)
    assert_close(c.d_alpha, (up.alpha - down.alpha) / (2 * h), atol=1e-6, rtol=1e-6)
    assert_close(c.d_sigma, (up.sigma - down.sigma) / (2 * h), atol=1e-6, rtol=1e-6)


def test_time_of_inverts_log_snr(schedule):
    """Over the whole range, at and between table indices. Fails with a table searched in the wrong direction."""
    t = torch.linspace(0.001, 0.999, 41, dtype=torch.float64)
    assert_close(schedule.time_of(schedule.at(t).log_snr), t, atol=1e-9, rtol=0)


def test_time_of_infinite_snr_is_an_end(schedule):
    t = schedule.time_of(torch.tensor([torch.inf, -torch.inf]))
    assert t.tolist() == [0, 1]


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_matched_states_have_the_same_snr_and_scale(schedules, source, target):
    """c x_source is a target state: both coefficients agree. Fails with the factor inverted."""
    here, there = schedules[source], schedules[target]
    t = INSIDE if source != "edm" else torch.tensor([0.2, 0.5, 0.6], dtype=torch.float64)  # levels VP reaches as well
    time, scale = match(t, here, there)
    c, d = here.at(t), there.at(time)
    assert_close(scale * c.alpha, d.alpha, atol=0, rtol=1e-9)
    assert_close(scale * c.sigma, d.sigma, atol=0, rtol=1e-9)


def test_matching_pure_noise_clamps_to_the_tables_end(schedules):
    """Flow t = 1 has no signal; the table's noisiest level stands in. Fails with c a ratio of alphas (inf)."""
    time, scale = match(torch.ones(1), schedules["flow"], schedules["vp"])
    assert time.tolist() == [1]
    assert_close(scale, torch.ones(1))


def test_prior_is_the_networks_input_at_full_noise():
    eps = torch.tensor([[0.5, -2.0]])
    assert torch.equal(EDM().prior(eps), 80 * eps)
    assert torch.equal(TrigFlow(0.5).prior(eps), 0.5 * eps)
    assert torch.equal(RectifiedFlow().prior(eps), eps)
    assert torch.equal(VPTable.scaled_linear().prior(eps), eps)


def test_schedules_can_live_in_a_config(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule
    assert hash(again) == hash(schedule)


def test_a_table_made_under_inference_mode_can_train_later():
    """Its values are cached, and autograd must not save an inference tensor. Fails if the table is multiplied as is."""
    with torch.inference_mode():
        table = VPTable.scaled_linear()
    x, t = torch.ones(1, 2, requires_grad=True), torch.tensor([0.5], requires_grad=True)
    table.add_noise(x, torch.zeros(1, 2), t).sum().backward()
    assert x.grad is not None and t.grad is not None


def test_a_zero_terminal_snr_table_is_refused():
    with pytest.raises(ValueError, match="zero-terminal-SNR"):
        VPTable((0.9, 0.5, 0.0))


def test_an_edm_with_swapped_ends_is_refused():
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        EDM(sigma_min=80.0, sigma_max=0.002)
