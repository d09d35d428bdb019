"""Teachers whose denoiser is a formula: what they sample, how they are judged, where their students start."""

import math

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import EDM
from fewstep.sampling import sample_teacher
from fewstep.teachers.closed_form import gaussian, mixture
from fewstep.teachers.pipelines import load_teacher
from fewstep.teachers.points import PointBackbone, PointNet, sliced_wasserstein
from fewstep.types import Condition

SCHEDULES = ["flow", "vp", "edm", "trig"]
MEAN, COV = torch.tensor([1.5, -0.5], dtype=torch.float64), torch.tensor([[0.25, 0.1], [0.1, 0.5]], dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_gaussians_denoiser_is_the_posterior_mean(name):
    """E[x0 | x_t] = m + alpha C (alpha^2 C + sigma^2 I)^-1 (x_t - alpha m)"""
    denoiser = gaussian(schedule=name).denoiser
    t = torch.tensor([0.1, 0.5, 0.9])
    c = denoiser.schedule.at(t.double())
    x_t = torch.tensor([[0.3, -1.0], [2.0, 0.4], [-0.7, 1.1]], dtype=torch.float64)
    for i in range(3):
        alpha, sigma = c.alpha[i], c.sigma[i]
        gain = alpha * COV @ torch.linalg.inv(alpha**2 * COV + sigma**2 * torch.eye(2, dtype=torch.float64))
        expected = MEAN + gain @ (x_t[i] - alpha * MEAN)
        assert_close(denoiser(x_t[i : i + 1], t[i : i + 1], Condition()).x0[0].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_teacher_samples_have_its_mean_and_covariance(name):
    """n = 4000: five standard errors are .08 sqrt(var) for means and .11 var for variances; 50 Heun steps add < .01."""
    x = sample_teacher(gaussian(schedule=name), 4000, batch_size=4000).double()
    assert_close(x.mean(0), MEAN, atol=0.08 * 0.71 + 0.01, rtol=0)
    assert_close(x.T.cov(), COV, atol=0.11 * 0.5 + 0.01, rtol=0)


def test_default_is_a_ring_of_modes():
    net = mixture(modes=5).denoiser.backbone.module
    assert_close(net.means.norm(dim=1), torch.full((5,), 2.0, dtype=torch.float64), atol=1e-6, rtol=0)
    assert len({round(math.atan2(y, x), 4) for x, y in net.means.tolist()}) == 5


def test_shapes_of_images_are_kept():
    teacher = mixture(torch.randn(2, 3, 4, 5), torch.full((2, 3, 4, 5), 0.1))
    assert teacher.shape == (3, 4, 5)
    assert sample_teacher(teacher, 2, num_steps=2).shape == (2, 3, 4, 5)


@pytest.mark.parametrize(
    ("covs", "variances"),
    [
        ([0.1, 0.4], [[0.1, 0.1], [0.4, 0.4]]),
        ([[0.1, 0.2], [0.3, 0.4]], [[0.1, 0.2], [0.3, 0.4]]),
        ([[[0.1, 0.0], [0.0, 0.2]]] * 2, [[0.1, 0.2]] * 2),
    ],
    ids=["isotropic", "diagonal", "full"],
)
def test_covs_are_variances_in_any_form(covs, variances):
    """Fails if a standard deviation is taken: .1 for .01."""
    net = mixture([[1.0, 0.0], [0.0, 2.0]], covs).denoiser.backbone.module
    assert_close(net.variances, torch.tensor(variances, dtype=torch.float64), atol=1e-7, rtol=0)


def test_two_means_in_two_dimensions_are_not_taken_for_a_covariance():
    """[K, *shape] = [2, 2] beside [K, D, D] = [2, 2, 2]; and [1, 1, 1] is a full covariance of one number."""
    assert mixture([[[1.0]]], [[[0.3]]]).denoiser.backbone.module.variances.item() == pytest.approx(0.3)


def test_options_make_the_teacher_again():
    """What a run's config.yaml keeps.  Fails if an argument is not recorded."""
    first = mixture(
        torch.tensor([[1.0, 2.0], [0.0, 0.5]]), [0.1, 0.3], [0.2, 0.8], classes=[1, 0], schedule="edm", fit_steps=3
    )
    again = load_teacher("mixture", **first.options)
    x, t = torch.randn(2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0.3, 0.8])
    cond = first.encode(["class 0", "class 1"])
    assert torch.equal(first.denoiser(x, t, cond).x0, again.denoiser(x, t, cond).x0)
    assert_close(dict(first.student().state_dict()), dict(again.student().state_dict()), atol=0, rtol=0)
    assert again.options == first.options


def test_gaussians_options_make_it_again():
    first = gaussian([1.0, 2.0], 0.3, schedule="vp", fit_steps=3)
    again = load_teacher("gaussian", **first.options)
    assert torch.equal(first.denoiser.backbone.module.variances, again.denoiser.backbone.module.variances)
    assert (again.card.name, again.options) == ("gaussian", first.options)


def test_classes_are_the_prompts():
    teacher = mixture([[1.0], [2.0], [3.0]], [0.1] * 3, classes=[2, 0, 2])
    assert teacher.prompts == ("class 0", "class 2")
    found = teacher.encode(["class 2", "class 0"])
    assert (found.tensors["class"].tolist(), found.null["class"].tolist()) == ([2, 0], [-1])
    with pytest.raises(ValueError, match=r"knows no prompt 'class 1'; allowed: 'class 0', 'class 2'"):
        teacher.encode(["class 1"])


def test_class_is_obeyed():
    teacher = mixture([[-3.0], [3.0]], [0.01, 0.01], classes=[0, 1])
    x = sample_teacher(teacher, 8, ["class 0", "class 1"], num_steps=10)
    assert_close(x.sign().flatten(), torch.tensor([-1.0, 1.0] * 4))


@pytest.mark.parametrize("name", SCHEDULES)
def test_students_network_without_weights_is_the_gaussian_formula(name):
    """The preconditioning alone denoises a diagonal Gaussian exactly.  Fails with EDM's, which is centred on zero."""
    teacher = gaussian([1.5, -0.5], [0.25, 0.5], schedule=name)
    module = PointNet(2, 1)
    torch.nn.init.zeros_(module.outer.weight)
    torch.nn.init.zeros_(module.outer.bias)
    backbone = PointBackbone(module, teacher.denoiser.schedule, MEAN, torch.tensor([0.25, 0.5]).sqrt())
    x, t = torch.randn(5, 2, generator=torch.Generator().manual_seed(1)), torch.linspace(0.02, 1, 5)
    assert_close(backbone(x, t, Condition()), teacher.denoiser(x, t, Condition()).x0, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_student_starts_near_the_formula(name):
    """Fails if the fit runs on another schedule or another target.  Root mean square over the teacher's own x_t,
    against the data's spread of 1.4: the straight average of the ring would be off by about 1."""
    teacher = mixture(schedule=name)
    student, net = teacher.student(), teacher.denoiser.backbone.module
    generator = torch.Generator().manual_seed(3)
    x0, t = net.sample(2000, generator), torch.rand(2000, generator=generator)
    x_t = teacher.denoiser.schedule.add_noise(x0, torch.randn(2000, 2, generator=generator), t)
    gap = student(x_t, t, Condition()).x0 - teacher.denoiser(x_t, t, Condition()).x0
    assert gap.square().mean().sqrt() < 0.25


def test_fitting_draws_nothing_from_the_global_generator():
    before = torch.get_rng_state()
    first, second = (mixture(fit_steps=2).student().state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert_close(dict(first), dict(second), atol=0, rtol=0)


def test_distance_in_one_dimension_is_that_of_sorted_values():
    """Two points moved by 1 and by 3: 2.  Directions in one dimension are +1 and -1."""
    assert sliced_wasserstein(torch.tensor([[0.0], [10.0]]), torch.tensor([[13.0], [1.0]])) == pytest.approx(2.0)


def test_distance_of_a_shift_is_its_mean_projection():
    """E|<u, a>| = 2 |a| / pi in the plane; 64 directions: standard error .04 |a|."""
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = sliced_wasserstein(x, x + torch.tensor([3.0, 4.0]))
    assert found == pytest.approx(5 * 2 / math.pi, rel=0.2)


def test_exact_samples_are_judged_good_and_a_lost_mode_bad():
    teacher = mixture()
    net, measure = teacher.denoiser.backbone.module, teacher.evaluation.measure
    x = net.sample(4000, torch.Generator().manual_seed(1))
    good, collapsed = measure(x, [""] * 4000), measure(x[x[:, 0] > 0], [""])
    assert good["modes"] == 1 and good["inside"] > 0.99 and good["sw"] < 0.1 and good["fd"] < 0.05
    assert collapsed["modes"] <= 5 / 8 and collapsed["sw"] > 0.3 and collapsed["inside"] > 0.99


def test_samples_between_the_modes_are_not_inside():
    """What the moments cannot see: a Gaussian of the ring's mean and covariance."""
    teacher = mixture()
    net = teacher.denoiser.backbone.module
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double() @ torch.linalg.cholesky(net.cov).T
    found = teacher.evaluation.measure(x + net.mean, [""])
    assert found["fd"] < 0.05 and found["inside"] < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosine"}, "no schedule 'cosine'; allowed: flow, vp, edm, trig"),
        ({"modes": 0}, "modes must be >= 1, got 0"),
        ({"means": [[1.0], [2.0, 3.0]]}, "means must be .*numbers of one shape"),
        ({"means": [[float("inf")]]}, "means holds a value that is not finite"),
        ({"means": [[1.0], [2.0]], "covs": [0.1, 0.2, 0.3]}, r"covs must be \[K\] = \[2\].*got \[3\]"),
        ({"means": [[1.0], [2.0]], "covs": [0.1, -0.2]}, "covs are variances and must be >= 0, got -0.2"),
        ({"means": [[1.0], [2.0]], "weights": [1.0]}, "weights must be 2 positive numbers"),
        ({"means": [[1.0], [2.0]], "classes": [0]}, "classes must be 2 integers"),
    ],
)
def test_impossible_mixture_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixture(**options)


def test_a_schedule_object_cannot_be_forgotten():
    """Its name is not in a configuration file; loading must refuse, not fall back to "flow"."""
    teacher = gaussian(schedule=EDM(sigma_max=10.0), fit_steps=0)
    assert "sigma_max=10" in teacher.options["schedule"]
    with pytest.raises(ValueError, match="no schedule"):
        gaussian(**teacher.options)
    with pytest.raises(ValueError, match="no schedule 5"):
        gaussian(schedule=5)


def test_a_prompt_that_would_have_no_effect_is_an_error():
    with pytest.raises(ValueError, match="knows no prompt 'a boot'"):
        gaussian(fit_steps=0).encode(["a boot"])
