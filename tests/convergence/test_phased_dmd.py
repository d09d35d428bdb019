"""Phased DMD on closed-form teachers."""

import pytest

import fewstep
from tests.recovery import OPTIM, QUIET, assert_recovered


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        pytest.param("flow", {}, id="flow"),
        pytest.param("vp", {}, id="vp", marks=pytest.mark.slow),
        pytest.param("edm", {"iterations": 2000}, id="edm", marks=pytest.mark.slow),
        pytest.param(
            "flow", {"train": {"sharing": "lora"}, "iterations": 2000}, id="flow-lora", marks=pytest.mark.slow
        ),
    ],
)
def test_two_phases_recover_a_gaussians_mean_and_covariance(schedule, options, run_folder):
    """Within 5% of the teacher's spread, by two experts.  Fails with a biased fake score in the first phase: its x_s
    comes out too narrow, and the second expert inherits that.

    In four steps it does not: an expert's steps are matched together, one makes up for another, and what the sampler
    takes, the longer way, ends 17% and 11% too wide (2000 iterations).
    """
    train = {"generator": OPTIM, "critic": OPTIM, "ema": 0.98, "lora": {"rank": 16, "alpha": 16.0}, **QUIET}
    run = fewstep.distill(
        fewstep.teachers.gaussian(schedule=schedule, fit_steps=100),
        "phased_dmd",
        batch_size=128,
        out=run_folder,
        guidance=1.0,
        **{"num_steps": 2, "iterations": 1000, **options, "train": train | options.get("train", {})},
    )
    assert_recovered(run)
