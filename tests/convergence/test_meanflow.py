"""MeanFlow on a closed-form teacher."""

import pytest

import fewstep
from tests.convergence.recipes import distilled
from tests.recovery import assert_recovered


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_few_steps_recover_a_gaussians_mean_and_covariance(steps, run_folder):
    """Within 5% of the teacher's spread, on flow.  (On VP pure noise is not the ODE's start: see the class.)"""
    teacher = fewstep.teachers.gaussian(fit_steps=100, slow_time=True)
    assert_recovered(distilled(teacher, "meanflow", run_folder, num_steps=steps))
