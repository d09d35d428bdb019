"""SiD on closed-form teachers: the student must recover the distribution, not merely run."""

import pytest

import fewstep
from tests.convergence.recipes import distilled
from tests.recovery import assert_recovered


@pytest.mark.parametrize("schedule", ["flow", "vp", "edm"])
def test_one_step_recovers_a_gaussians_mean_and_covariance(schedule, run_folder):
    """Within 5% of the teacher's spread.  Fails for a reversed sign, a wrong first level, a fake score that lags.

    At 1:1, the paper's ratio for its far smaller steps, the mean ended .056 (flow) and .069 (vp) of the spread off, at
    2:1 .038 and .032, at 5:1 .009 and .013.  On EDM the levels are SiD's own; up to index 979, where sigma is 72, the
    correlation ended .05 off at 5:1.
    """
    levels = {"min_index": 0, "max_index": 799} if schedule == "edm" else {}
    assert_recovered(
        distilled(fewstep.teachers.gaussian(schedule=schedule, fit_steps=100), "sid", run_folder, **levels)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("head", "weight"), [("pooled", 1.0), ("learned", 0.3)])
def test_the_gan_does_not_disturb_the_optimum(head, weight, run_folder):
    """SiDA: identity and GAN have one optimum, the data.  Fails with a flipped GAN sign.

    Weights at which that shows, far above the paper's: reversed, the mean ended .44 (pooled) and 8.8 (learned) of the
    spread off, as it should be .026 and .025.  At .01 the identity holds against a reversed GAN.
    """
    gan = {"gan_weight": weight, "gan_critic_weight": 0.1, "gan_head": head}
    assert_recovered(distilled(fewstep.teachers.gaussian(fit_steps=100), "sid", run_folder, **gan))
