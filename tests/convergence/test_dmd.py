"""DMD on closed-form teachers."""

import pytest

import fewstep
from tests.convergence.recipes import distilled
from tests.recovery import assert_recovered


@pytest.mark.parametrize("schedule", ["flow", "vp", "edm"])
def test_one_step_with_pairs_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """At the paper's turns of 1:1, within 5% of the teacher's spread."""
    assert_recovered(distilled(fewstep.teachers.gaussian(schedule=schedule, fit_steps=100), "dmd", run_folder))
