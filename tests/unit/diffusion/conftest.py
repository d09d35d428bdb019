"""The four schedules, and a closed-form Gaussian denoiser on any of them."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fewstep.diffusion import EDM, NoiseSchedule, Prediction, RectifiedFlow, TrigFlow, VPTable
from fewstep.types import Condition

SCHEDULES = {"vp": VPTable.scaled_linear(), "flow": RectifiedFlow(), "edm": EDM(), "trig": TrigFlow(sigma_d=0.5)}


@pytest.fixture(params=SCHEDULES)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return SCHEDULES[request.param]


@pytest.fixture
def schedules() -> dict[str, NoiseSchedule]:
    return SCHEDULES


@pytest.fixture
def gaussian() -> Callable[..., Callable[..., Prediction]]:
    """gaussian(schedule, mean, std): the exact x0 denoiser of N(mean, std^2); `.calls` records (x_t, t, cond)."""

    class Exact:
        def __init__(self, schedule: NoiseSchedule, mean: float = 1.5, std: float = 0.5) -> None:
            self.schedule, self.mean, self.std = schedule, mean, std
            self.calls: list[tuple[Tensor, Tensor, Condition]] = []

        def __call__(self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
            self.calls.append((x_t, t, cond))
            c = self.schedule.at(t.to(torch.promote_types(x_t.dtype, t.dtype))).like(x_t)
            gain = c.alpha * self.std**2 / (c.alpha**2 * self.std**2 + c.sigma**2)
            x0 = self.mean + gain * (x_t - c.alpha * self.mean)
            return Prediction(x0, x_t, t, "x0", self.schedule)

    return Exact
