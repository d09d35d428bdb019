"""BOOT on closed-form teachers."""

import pytest

import fewstep
from tests.convergence.recipes import distilled
from tests.recovery import assert_recovered


@pytest.mark.parametrize(
    "schedule", ["flow", pytest.param("vp", marks=pytest.mark.slow), pytest.param("edm", marks=pytest.mark.slow)]
)
def test_one_step_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """Within 5% of the teacher's spread, of which Heun's 25 steps take 1.2% in the limit (DDIM's: 6%)."""
    assert_recovered(distilled(fewstep.teachers.gaussian(schedule=schedule, fit_steps=100), "boot", run_folder))
