"""What every method is asked alike: where guidance takes it, and whether it finds every mode."""

import pytest
import torch

import fewstep
from fewstep.api import Run
from fewstep.objectives.base import METHODS
from fewstep.teachers import Teacher
from tests.convergence.recipes import RECIPES, SLOW_TIME, distilled
from tests.recovery import OPTIM

COV = ((0.25, 0.1), (0.1, 0.5))
SPREAD, CORRELATION = (0.5, 0.5**0.5), 0.1 / (0.25 * 0.5) ** 0.5
GUIDED_BY_ONE = sorted(RECIPES.keys() - {"swiftbrush"})


def moments(run: Run, prompt: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean, standard deviations and correlation of a prompt's samples."""
    x = run.student.sample(20_000, [prompt], seed=5, batch_size=20_000).double()
    cov = torch.cov(x.T)
    return x.mean(0), cov.diagonal().sqrt(), float(cov[0, 1] / cov.diagonal().prod().sqrt())


def test_every_method_is_asked():
    assert RECIPES.keys() == {name for name in METHODS.names() if METHODS.get(name).__module__.startswith("fewstep.")}


@pytest.mark.slow
@pytest.mark.parametrize("method", GUIDED_BY_ONE)
def test_guidance_ends_at_the_extrapolated_gaussian(method, run_folder):
    """Two classes of one covariance, of which the empty prompt means the second (its weight is all but 1).

    The guided denoiser D_u + g (D_c - D_u) is then that of N(m_c + (g - 1)(m_c - m_u), C) at every level, so that every
    method, along trajectories or by distributions, has this one fixed point: the first class is moved by as much again
    as it lies from the second, which stays.
    """
    teacher = fewstep.teachers.mixture(
        [[0.5, -0.5], [0.0, 0.0]],
        [COV, COV],
        weights=[1e-9, 1.0],
        classes=[0, 1],
        slow_time=method in SLOW_TIME,
        fit_steps=100,
    )
    times = {"times": "full"} if method == "decoupled_dmd" else {}
    run = distilled(teacher, method, run_folder, guidance=2.0, **times)
    for prompt, mean in (("class 0", [1.0, -1.0]), ("class 1", [0.0, 0.0])):
        found, spread, correlation = moments(run, prompt)
        assert found.tolist() == pytest.approx(mean, abs=0.2 * 0.5)
        assert spread.tolist() == pytest.approx(SPREAD, rel=0.1)
        assert correlation == pytest.approx(CORRELATION, abs=0.1)


@pytest.mark.slow
def test_guidance_of_both_scores_ends_at_the_prompts_own_gaussians(run_folder):
    """SwiftBrush guides the fake score like the real one, and the two cancel where the student is right.

    As long as the fake score's empty prompt means all of the student's samples: when the student, too, lost its prompt
    in those turns, the spreads ended at half.  What is left over is the lag of the fake score times the guidance.
    """
    teacher = fewstep.teachers.mixture([[0.5, -0.5], [-0.5, 0.5]], [COV, COV], classes=[0, 1], fit_steps=100)
    run = distilled(teacher, "swiftbrush", run_folder, guidance=2.0)
    for prompt, mean in (("class 0", [0.5, -0.5]), ("class 1", [-0.5, 0.5])):
        found, spread, correlation = moments(run, prompt)
        assert found.tolist() == pytest.approx(mean, abs=0.3 * 0.5)
        assert spread.tolist() == pytest.approx(SPREAD, rel=0.15)
        assert correlation == pytest.approx(CORRELATION, abs=0.2)


def mixtures(name: str, *, slow: bool) -> tuple[Teacher, float]:
    """The ring, or four modes in 16 dimensions; and six times the distance of as many exact samples.

    "one class" are those in 16 dimensions as one class, which guidance leaves as it is: with and without the prompt the
    score is the same.
    """
    if name == "ring":
        return fewstep.teachers.mixture(slow_time=slow), 6 * 0.034
    means = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    weights = [0.4, 0.3, 0.2, 0.1]
    classes = {"classes": [0] * 4} if name == "one class" else {}
    return fewstep.teachers.mixture(means, [0.1] * 4, weights=weights, slow_time=slow, **classes), 6 * 0.024


@pytest.mark.slow
@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("name", ["ring", "sixteen"])
def test_every_mode_is_found(name, method, run_folder):
    """Eight equal Gaussians on a ring in the plane; four of weights .4, .3, .2, .1 in 16 dimensions.

    Every mode holds at least a quarter of its mass, and the sliced Wasserstein distance of 5000 samples is within six
    times that of as many exact ones, .034 and .024 (means of three seeds).  A one-step student is a continuous map and
    leaves samples between the modes.
    """
    teacher, bound = mixtures(name, slow=method in SLOW_TIME)
    run = distilled(teacher, method, run_folder)
    figures = run.teacher.evaluation.measure(run.student.sample(5000, seed=7, batch_size=5000), [""])
    assert figures["modes"] == 1
    assert figures["sw"] < bound


CALMER = {
    "iterations": 1500,
    "batch_size": 256,
    "train": {"generator": {**OPTIM, "lr": 5e-4}, "critic": {**OPTIM, "lr": 1e-3}, "ema": 0.99},
}
"""A quarter of the other tests' rates: in several steps the masses of the modes drift at those."""


SEVERAL = {
    ("ring", "dmd2", 2): CALMER,
    ("ring", "decoupled_dmd", 2): CALMER,
    ("ring", "decoupled_dmd", 4): CALMER | {"turns": {"critic_per_generator": 3}},
    ("ring", "phased_dmd", 4): {},
    ("ring", "sid", 2): CALMER,
    ("ring", "sid", 4): CALMER,
    ("ring", "tbcm", 2): {},
    ("ring", "scm", 2): {},
    ("ring", "meanflow", 4): {},
    # At the grid's .5 the paper's x1 - y leaves the sampler too narrow; see the class.
    ("ring", "tmd", 2): CALMER | {"iterations": 1200, "batch_size": 128, "judged": "state"},
    ("sixteen", "dmd2", 2): CALMER | {"iterations": 3500},
    ("sixteen", "dmd2", 4): CALMER,
    # Guided, so that its times may be the method's own; the term of guidance is zero here.
    ("one class", "decoupled_dmd", 2): CALMER | {"iterations": 3500, "times": "hybrid", "guidance": 2.0},
    ("one class", "decoupled_dmd", 4): CALMER | {"times": "hybrid", "guidance": 2.0},
    ("sixteen", "phased_dmd", 4): {},
    ("sixteen", "sid", 2): CALMER,
    ("sixteen", "sid", 4): CALMER,
    ("sixteen", "tbcm", 2): {},
    ("sixteen", "scm", 2): {},
    ("sixteen", "meanflow", 4): {},
    # With the paper's shift of the re-noising law; without, the lightest mode ends below a quarter of its mass.
    ("sixteen", "tmd", 2): CALMER | {"batch_size": 192, "judged": "state", "shift": 5.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "method", "steps"), SEVERAL)
def test_every_mode_is_found_in_several_steps(name, method, steps, run_folder):
    """As above; each was within .079 to .176 on the ring and .039 to .122 in 16 dimensions (one seed).

    At the short recipes DMD2 and SiD in two steps ended at .28 and .24 on the ring, Decoupled DMD on one machine at
    .23, TMD judged at x1 - y at .32, and calmer at .23.  DMD2 in four steps has a test with a recipe of its own
    (test_dmd2.py).  In 16 dimensions DMD2 in two steps needs 3500 iterations, .156 after 1500 for .118; Decoupled DMD
    with its times "constrained" to levels below a step's loses the lightest mode, which such levels hardly see.
    """
    teacher, bound = mixtures(name, slow=method in SLOW_TIME)
    run = distilled(teacher, method, run_folder, num_steps=steps, **SEVERAL[name, method, steps])
    figures = run.teacher.evaluation.measure(run.student.sample(5000, seed=7, batch_size=5000), [""])
    assert figures["modes"] == 1
    assert figures["sw"] < bound
