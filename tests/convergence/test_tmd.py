"""TMD on the closed-form Gaussian, both stages through the one way in."""

import pytest

import fewstep
from tests.recovery import OPTIM, QUIET, assert_recovered


@pytest.mark.parametrize(
    ("steps", "inner", "iterations", "how"),
    [
        (1, 2, 600, {"jvp_step": 2e-3}),
        pytest.param(1, 4, 1200, {"jvp": "exact"}, marks=pytest.mark.slow),
        pytest.param(1, 2, 1200, {"jvp": "exact", "simulated": True}, marks=pytest.mark.slow),
    ],
)
def test_both_stages_recover_a_gaussians_mean_and_covariance(steps, inner, iterations, how, run_folder):
    """Within 5% of the teacher's spread.  The small network's only hidden layer that makes a head hears of y_s through
    the gate alone, so that the gate starts half open; without shifts, which are for pictures."""
    run = fewstep.distill(
        fewstep.teachers.gaussian(fit_steps=100),
        "tmd",
        num_steps=steps,
        iterations=iterations,
        batch_size=128,
        out=run_folder,
        head_blocks=1,
        inner_steps=inner,
        gate=0.0,
        pretraining=0.3,
        pretraining_guidance=1.0,
        guidance=1.0,
        gan_weight=0.0,
        shift=1.0,
        student_shift=1.0,
        turns={"critic_per_generator": 3, "exclusive": False},
        train={"generator": OPTIM, "critic": OPTIM, "ema": 0.99, **QUIET},
        **how,
    )
    assert_recovered(run)
