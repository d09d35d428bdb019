import math

import pytest
from torch import nn
from torch.testing import assert_close

from fewstep.training.optim import OptimConfig, build_optimizer, learning_rate


def test_warm_up_is_linear_and_never_zero():
    """(u + 1) / (W + 1): the first update moves, and full speed is reached after W updates.  Fails with u / W."""
    config = OptimConfig(lr=2.0, warmup=3)
    assert [learning_rate(config, u, 100) for u in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_no_warm_up_is_full_speed_from_the_first_update():
    assert learning_rate(OptimConfig(lr=2.0), 0, 100) == 2.0


def test_cosine_goes_from_full_speed_towards_zero():
    """lr (1 + cos(pi u / N)) / 2: full, half in the middle, and the last update is small but moves."""
    config = OptimConfig(lr=2.0, schedule="cosine")
    rates = [learning_rate(config, u, 100) for u in range(100)]
    assert_close((rates[0], rates[50], rates[99]), (2.0, 1.0, 1 + math.cos(math.pi * 0.99)), rtol=1e-14, atol=0)
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert learning_rate(config, 250, 100) == 0  # past the plan it stays there


def test_cosine_of_an_empty_plan_is_defined():
    assert learning_rate(OptimConfig(lr=2.0, schedule="cosine"), 0, 0) == 2.0


def test_optimizer_holds_parameters_that_do_not_require_grad_yet():
    """Players are built between turns, when nothing does.  Fails with a filter on requires_grad."""
    net = nn.Linear(3, 2).requires_grad_(False)
    config = OptimConfig(lr=0.3, betas=(0.0, 0.9), eps=1e-6, weight_decay=0.2)
    (group,) = build_optimizer(net.parameters(), config).param_groups
    assert len(group["params"]) == 2
    assert [group[k] for k in ("lr", "betas", "eps", "weight_decay")] == [0.3, (0.0, 0.9), 1e-6, 0.2]


@pytest.mark.parametrize(
    "bad", [{"lr": 0.0}, {"lr": float("nan")}, {"betas": (0.9, 1.0)}, {"clip": 0.0}, {"warmup": -1}, {"lr": -1.0}]
)
def test_settings_that_cannot_train_are_refused(bad: dict):
    with pytest.raises(ValueError, match=next(iter(bad))):
        OptimConfig(**bad)
