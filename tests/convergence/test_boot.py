"""BOOT on closed-form teachers."""

import pytest

import fewstep
from tests.recovery import OPTIM, QUIET, assert_recovered


@pytest.mark.parametrize(
    "schedule", ["flow", pytest.param("vp", marks=pytest.mark.slow), pytest.param("edm", marks=pytest.mark.slow)]
)
def test_one_step_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """Within 5% of the teacher's spread, of which Heun's 25 steps take 1.2% in the limit (DDIM's: 6%)."""
    run = fewstep.distill(
        fewstep.teachers.gaussian(schedule=schedule, fit_steps=100),
        "boot",
        iterations=500,
        batch_size=64,
        out=run_folder,
        guidance=1.0,
        step=0.04,
        train={"generator": OPTIM, "ema": 0.98, **QUIET},
    )
    assert_recovered(run)
