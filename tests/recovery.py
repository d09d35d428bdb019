"""How the convergence tests train, and what they call recovered."""

import pytest
import torch

from fewstep.api import Run

OPTIM = {"lr": 2e-3, "betas": [0.0, 0.99], "weight_decay": 0.0, "schedule": "cosine"}
QUIET = {"evaluate_every": 10_000, "checkpoint_every": 10_000, "log_every": 1000, "device": "cpu"}


def assert_recovered(run: Run) -> None:
    """Mean and covariance of the default Gaussian within 5% of its spread."""
    assert_moments(run.student.sample(20_000, seed=5, batch_size=20_000))


def assert_moments(x: torch.Tensor) -> None:
    """The same of samples [N, 2]."""
    x = x.double()
    cov = torch.cov(x.T)
    assert x.mean(0).tolist() == pytest.approx([1.5, -0.5], abs=0.05 * 0.5)
    assert cov.diagonal().sqrt().tolist() == pytest.approx([0.5, 0.5**0.5], rel=0.05)
    correlation = cov[0, 1] / cov.diagonal().prod().sqrt()
    assert correlation.item() == pytest.approx(0.1 / (0.25 * 0.5) ** 0.5, abs=0.05)
