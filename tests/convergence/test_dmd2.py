"""DMD2 on closed-form teachers: the student must recover the distribution, not merely run."""

import pytest

import fewstep
from fewstep.api import Run
from tests.recovery import OPTIM, QUIET, assert_recovered


def distilled(teacher, out, *, iterations: int, batch_size: int, num_steps: int = 1, train=None, **method) -> Run:
    return fewstep.distill(
        teacher,
        "dmd2",
        num_steps=num_steps,
        iterations=iterations,
        batch_size=batch_size,
        out=out,
        guidance=1.0,
        train={"generator": OPTIM, "critic": OPTIM, "ema": 0.98, **QUIET, **(train or {})},
        **method,
    )


@pytest.mark.parametrize("schedule", ["flow", "vp", "edm"])
def test_one_step_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """On every schedule, within 5% of the teacher's spread.  Fails for a reversed sign, a wrong prior, a guided fake
    score, a mis-broadcast coefficient: each drifts or collapses."""
    teacher = fewstep.teachers.gaussian(schedule=schedule, fit_steps=100)
    assert_recovered(distilled(teacher, run_folder, iterations=600, batch_size=128))


@pytest.mark.parametrize("features", ["fake", "teacher"])
def test_the_gan_does_not_disturb_the_optimum(features, run_folder):
    """Matching and GAN have one optimum, the data.  Fails with a flipped GAN sign or with features of the formula,
    which has none to read."""
    teacher = fewstep.teachers.gaussian(fit_steps=100)
    gan = {"gan_weight": 1e-2, "gan_critic_weight": 0.1, "gan_features": "fake"}
    if features == "teacher":
        with pytest.raises(ValueError, match="has no default features for a GAN"):
            distilled(teacher, run_folder, iterations=2, batch_size=8, **gan | {"gan_features": features})
        return
    assert_recovered(distilled(teacher, run_folder, iterations=600, batch_size=128, **gan))


@pytest.mark.parametrize("sharing", ["lora", "lora-fake"])
def test_adapters_recover_a_gaussian_too(sharing, run_folder):
    """Fails if the roles move each other's weights, or the teacher's."""
    teacher = fewstep.teachers.gaussian(fit_steps=100)
    train = {"sharing": sharing, "lora": {"rank": 16, "alpha": 16.0}}
    assert_recovered(distilled(teacher, run_folder, iterations=600, batch_size=128, train=train))


@pytest.mark.slow
@pytest.mark.parametrize("num_steps", [1, 4])
def test_every_mode_of_a_ring_is_found(num_steps, run_folder):
    """Eight Gaussians of radius .14 on a circle of radius 2: a student that drops a mode is at a distance above 0.4.

    A one-step student is a continuous map and leaves samples between the modes; 0.11 in the run that set the bound.
    In four steps the masses of the modes drift: at the other tests' rates the last checkpoint of seeds 0, 1, 2 was at
    0.22, 0.57, 0.20, on one machine 0.12.  A quarter of those rates, twice the batch and the best checkpoint by the
    running figure, as any user's run has it, give 0.18, 0.16, 0.18, 0.19 for seeds 0 to 3 (5000 samples, seed 7).
    """
    calm: dict = {"batch_size": 256}
    if num_steps == 4:
        rates = {"generator": {**OPTIM, "lr": 5e-4}, "critic": {**OPTIM, "lr": 1e-3}}
        calm = {"batch_size": 512, "train": {**rates, "ema": 0.99, "evaluate_every": 250}}
    run = distilled(fewstep.teachers.mixture(), run_folder, iterations=3000, num_steps=num_steps, **calm)
    figures = run.teacher.evaluation.measure(run.student.sample(5000, seed=7, batch_size=5000), [""])
    assert figures["modes"] == 1
    assert figures["sw"] < 0.2
