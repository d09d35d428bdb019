import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM, RectifiedFlow, TrigFlow, VPTable
from fewstep.teachers.toy import MixtureNet
from fewstep.types import Condition

SCHEDULES = [VPTable.scaled_linear(), RectifiedFlow(), EDM(), TrigFlow(0.5)]
FLOW = RectifiedFlow()


def full_covariances(count, size, seed=0):
    root = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.mT / size + 0.05 * torch.eye(size, dtype=torch.float64)


def image_mixture(schedule, spread, shape=(2, 2, 3)):
    """Three components in an image's shape, with one of the three kinds of covariance."""
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    kinds = {
        "scalar": {"std": torch.tensor([0.3, 0.8, 0.5])},
        "diagonal": {"std": 0.2 + torch.rand(3, *shape, generator=generator)},
        "full": {"cov": full_covariances(3, means[0].numel())},
    }
    return MixtureNet(means, schedule, weights=torch.tensor([1.0, 2.0, 5.0]), **kinds[spread])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_denoiser_is_the_posterior_mean_by_brute_force(schedule):
    """1-D, against a sum over 20 001 values of x0. Fails if weights are ignored, or alpha is missing in the gain."""
    means, std, weights = torch.tensor([[-1.0], [2.0]]), torch.tensor([0.4, 0.7]), torch.tensor([0.3, 0.7])
    net = MixtureNet(means, schedule, std=std, weights=weights)
    t = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    c = schedule.at(t)
    x_t = c.alpha * 0.4 + c.sigma * torch.tensor([0.9, -0.7, 0.2])
    x0 = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    prior = (weights / std * torch.exp(-0.5 * ((x0[:, None] - means[:, 0]) / std) ** 2)).sum(1)
    likelihood = torch.exp(-0.5 * ((x_t[:, None] - c.alpha[:, None] * x0) / c.sigma[:, None]) ** 2)
    expected = (likelihood * prior * x0).sum(1) / (likelihood * prior).sum(1)
    assert_close(net(x_t[:, None], t)[:, 0], expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("spread", ["scalar", "diagonal", "full"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_score_is_the_gradient_of_the_log_density(schedule, spread):
    """(alpha x0 - x_t) / sigma^2 in float64, image-shaped x. Fails with a basis applied untransposed."""
    net = image_mixture(schedule, spread)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    c = schedule.at(t).like(torch.empty(3, 2, 2, 3))
    noise = torch.randn(3, 2, 2, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x_t = (c.alpha + c.sigma) * noise
    x_t.requires_grad_()
    (gradient,) = torch.autograd.grad(net.log_density(x_t, t).sum(), x_t)
    score = (c.alpha * net(x_t, t) - x_t) / c.sigma**2
    assert_close(score, gradient, atol=1e-9, rtol=1e-8)


def test_log_density_is_that_of_torchs_mixture():
    """At t = .6 on rectified flow, with full covariances. Fails without the log-determinant or 2 pi."""
    net, t = image_mixture(FLOW, "full"), torch.full((4,), 0.6, dtype=torch.float64)
    x_t = torch.randn(4, 2, 2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, s = (v[0] for v in (FLOW.at(t).alpha, FLOW.at(t).sigma))
    v = a**2 * full_covariances(3, 12) + s**2 * torch.eye(12, dtype=torch.float64)
    components = torch.distributions.MultivariateNormal(a * net.means, v)
    expected = (components.log_prob(x_t.reshape(4, 1, 12)) + net.log_weights).logsumexp(1)
    assert_close(net.log_density(x_t, t), expected, atol=1e-9, rtol=0)


def test_full_covariance_agrees_with_diagonal():
    means, std = torch.tensor([[0.5, -1.0, 2.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.5, 1.0, 0.2], [0.3, 0.3, 0.9]])
    diagonal = MixtureNet(means, FLOW, std=std)
    full = MixtureNet(means, FLOW, cov=torch.diag_embed(std.double() ** 2))
    x_t, t = torch.tensor([[1.0, 0.0, -1.0], [0.2, 0.4, 0.6]], dtype=torch.float64), torch.tensor([0.3, 0.7])
    assert_close(full(x_t, t), diagonal(x_t, t), atol=1e-9, rtol=0)
    assert_close(full.cov, diagonal.cov, atol=1e-12, rtol=0)


def test_times_are_per_sample_when_batch_equals_components_and_size():
    """B = K = D = 3. Fails if alpha multiplies components or dimensions instead of samples."""
    net = MixtureNet(torch.eye(3), FLOW, std=torch.tensor([0.2, 0.5, 0.9]))
    x_t, t = torch.tensor([[1.0, 0.2, 0.1], [0.3, -1.0, 0.5], [0.0, 0.6, 2.0]]), torch.tensor([0.1, 0.5, 0.9])
    alone = torch.cat([net(x_t[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert_close(net(x_t, t), alone, atol=1e-6, rtol=0)


def test_classes_select_components_and_null_means_all():
    """Fails if the null class selects none, or if weights are not renormalised within a class."""
    means, std = torch.tensor([[-2.0], [2.0], [5.0]]), torch.tensor([0.3, 0.3, 0.6])
    weights, classes = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0, 1, 1])
    net = MixtureNet(means, FLOW, std=std, weights=weights, classes=classes)
    x_t, t = torch.tensor([[0.7], [0.7], [0.7]], dtype=torch.float64), torch.full((3,), 0.6)
    x0 = net(x_t, t, Condition({"class": torch.tensor([0, 1, -1])}, {"class": torch.tensor([-1])}))
    only_0 = MixtureNet(means[:1], FLOW, std=std[:1])
    only_1 = MixtureNet(means[1:], FLOW, std=std[1:], weights=weights[1:])
    expected = torch.cat([only_0(x_t[:1], t[:1]), only_1(x_t[:1], t[:1]), net(x_t[:1], t[:1])])
    assert_close(x0, expected, atol=1e-12, rtol=0)
    of_1 = Condition({"class": torch.tensor([1])})
    assert_close(net.log_density(x_t[:1], t[:1], of_1), only_1.log_density(x_t[:1], t[:1]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("label", [-1, 0, 1])
def test_samples_have_the_stated_moments(label):
    """n = 40 000, full covariances, two classes. 5 standard errors: .025 sqrt(var) and .035 var, of the largest var."""
    net = MixtureNet(
        torch.tensor([[1.0, -1.0], [0.0, 2.0], [-2.0, 0.0]]),
        FLOW,
        cov=full_covariances(3, 2, seed=5),
        weights=torch.tensor([0.2, 0.5, 0.3]),
        classes=torch.tensor([0, 1, 0]),
    )
    x0 = net.sample(40_000, torch.Generator().manual_seed(4), torch.full((40_000,), label)).double()
    mean, cov = net.moments(label)
    largest = cov.diagonal().max().item()
    assert_close(x0.mean(0), mean, atol=0.025 * largest**0.5, rtol=0)
    assert_close(x0.T.cov(), cov, atol=0.035 * largest, rtol=0)


def test_overall_moments_include_the_spread_of_the_means():
    net = MixtureNet(
        torch.tensor([[-1.0], [3.0]]), FLOW, std=torch.tensor([0.5, 1.0]), weights=torch.tensor([0.25, 0.75])
    )
    assert_close(net.mean, torch.tensor([2.0], dtype=torch.float64))
    assert_close(net.cov, torch.tensor([[0.25 * 0.25 + 0.75 * 1.0 + 0.25 * 9 + 0.75 * 1]], dtype=torch.float64))


def test_sampling_can_be_replayed():
    net = image_mixture(FLOW, "diagonal")
    draws = [net.sample(5, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(*draws)
    assert draws[0].shape == (5, 2, 2, 3)


def test_answer_has_the_inputs_dtype_and_is_computed_above_bfloat16():
    net, t = image_mixture(FLOW, "full"), torch.tensor([0.4, 0.6])
    x_t = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(6)).bfloat16()
    assert torch.equal(net(x_t, t), net(x_t.float(), t).bfloat16())
    assert net(x_t.double(), t).dtype == torch.float64


def test_a_point_mass_is_itself_at_every_level():
    """std 0, also where sigma = 0. Fails with 0 / 0 without the clamp."""
    net = MixtureNet(torch.tensor([[1.0, -2.0]]), FLOW, std=torch.zeros(1))
    x0 = net(torch.tensor([[1.0, -2.0], [0.3, 0.4], [9.0, 9.0]]), torch.tensor([0.0, 0.5, 1.0]))
    assert_close(x0, torch.tensor([[1.0, -2.0]]).expand(3, 2))


def test_far_states_stay_finite():
    """EDM at sigma 80 and far outside: log-sum-exp. Fails with densities multiplied as such (0 / 0)."""
    net = MixtureNet(torch.tensor([[-1.0], [1.0]]), EDM(), std=torch.tensor([0.1, 0.1]))
    x0 = net(torch.tensor([[500.0], [500.0]]), torch.tensor([0.0, 1.0]))
    assert x0.isfinite().all()


def test_forward_mode_derivatives_pass_through_the_net():
    net = image_mixture(FLOW, "full")
    x_t = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    t, dx = torch.tensor([0.4, 0.6], dtype=torch.float64), torch.ones_like(x_t)
    _, slope = torch.func.jvp(net, (x_t, t), (dx, torch.ones_like(t)))
    h = 1e-5
    assert_close(slope, (net(x_t + h * dx, t + h) - net(x_t - h * dx, t - h)) / (2 * h), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of std"),
        ({"std": torch.ones(3)}, r"std must be \[K\]"),
        ({"std": torch.tensor([1.0, -1.0])}, "std must be"),
        ({"cov": torch.eye(2)}, r"cov must be \[K, D, D\]"),
        ({"cov": -torch.eye(2).repeat(2, 1, 1)}, "positive semidefinite"),
        ({"std": torch.ones(2), "weights": torch.tensor([1.0, 0.0])}, "positive numbers"),
        ({"std": torch.ones(2), "classes": torch.tensor([0, -1])}, "integers >= 0"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixtureNet(torch.zeros(2, 2), FLOW, **arguments)
