"""DMD on closed-form teachers."""

import pytest

import fewstep
from tests.recovery import OPTIM, QUIET, assert_recovered


@pytest.mark.parametrize("schedule", ["flow", "vp", "edm"])
def test_one_step_with_pairs_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """At the paper's turns of 1:1, within 5% of the teacher's spread."""
    teacher = fewstep.teachers.gaussian(schedule=schedule, fit_steps=100)
    pairs = run_folder.parent / f"pairs-{schedule}"
    fewstep.make_pairs(teacher, pairs, 1000, num_steps=25)
    run = fewstep.distill(
        teacher,
        "dmd",
        iterations=600,
        batch_size=128,
        out=run_folder,
        pairs=str(pairs),
        guidance=1.0,
        train={"generator": OPTIM, "critic": OPTIM, "ema": 0.98, **QUIET},
    )
    assert_recovered(run)
