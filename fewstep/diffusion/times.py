"""Laws of time: which t a loss is taken at. Every law draws [B] float32 in [0, 1], 0 = data, from a keyed Rng."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fewstep.diffusion.schedules import NoiseSchedule
from fewstep.rng import Rng


class Law(Protocol):
    """A distribution of t in [0, 1]."""

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        """One time per sample of rng's batch, on `device` (None: where rng draws).  Returns [B] float32 in [0, 1]."""
        ...


@dataclass(frozen=True)
class Uniform:
    """t uniform on (low, high]: open at the clean end, because losses divide by sigma."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        u = rng.rand(stream).double()
        return (self.high - (self.high - self.low) * u).to(device, torch.float32)


@dataclass(frozen=True)
class DiscreteUniform:
    """t = i / (count - 1) with i uniform over low_index..high_index, both included     [DMD, arXiv:2311.18828, 3.2]

    The defaults are DMD's 20..980, that is 2% to 98% of 1000 steps; its fake score uses 0..999.
    """

    low_index: int = 20
    high_index: int = 980
    count: int = 1000

    def __post_init__(self) -> None:
        if not 0 <= self.low_index <= self.high_index < self.count or self.count < 2:
            raise ValueError(f"indices must satisfy 0 <= low_index <= high_index < count (count >= 2), got {self}.")

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        offset = (rng.rand(stream) * (self.high_index - self.low_index + 1)).floor()
        return ((self.low_index + offset) / (self.count - 1)).to(device, torch.float32)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std n), n ~ N(0, 1)     [SD3, arXiv:2403.03206, section 3.1]"""

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        n = rng.randn(stream).double()
        return torch.sigmoid(self.mean + self.std * n).to(device, torch.float32)


@dataclass(frozen=True)
class LogNormalSigma:
    """log(sigma / alpha) ~ N(mean, std^2), carried to `schedule`'s time     [EDM, arXiv:2206.00364, table 1]

    The defaults are EDM's P_mean = -1.2, P_std = 1.2. Levels outside the schedule's range are clamped to its ends.
    """

    schedule: NoiseSchedule
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _check_std(self.std)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        log_sigma = self.mean + self.std * rng.randn(stream).double()
        return self.schedule.time_of(-2 * log_sigma).to(device, torch.float32)


@dataclass(frozen=True)
class Interval:
    """Another law squeezed into [low, high]:  t = low + (high - low) t'.  Phased DMD's (s, 1]: Interval(law, low=s)."""

    law: Law
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        t = self.law.sample(rng, stream, device).double()
        return (self.low + (self.high - self.low) * t).float()


@dataclass(frozen=True)
class Shifted:
    """Another law pushed towards noise by `shift_time`."""

    law: Law
    shift: float

    def __post_init__(self) -> None:
        _check_shift(self.shift)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        return shift_time(self.law.sample(rng, stream, device), self.shift)


@dataclass(frozen=True)
class Clamped:
    """Another law with what lies outside [low, high] moved to that end."""

    law: Law
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_interval(self.low, self.high)

    def sample(self, rng: Rng, stream: str, device: torch.device | str | None = None) -> Tensor:
        return self.law.sample(rng, stream, device).clamp(self.low, self.high)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t' = k t / (1 + (k - 1) t): multiplies rectified flow's sigma / alpha by k     [SD3, arXiv:2403.03206, 5.3.2]

    t: any shape, floating, in [0, 1], 0 = data.  Returns its shape and dtype; 0 and 1 stay.
    """
    _check_shift(shift)
    return shift * t / (1 + (shift - 1) * t)


def _check_interval(low: float, high: float) -> None:
    if not 0 <= low < high <= 1:
        raise ValueError(f"times need 0 <= low < high <= 1, got low={low}, high={high}; divide an index by 999 first.")


def _check_std(std: float) -> None:
    if not (std > 0 and math.isfinite(std)):
        raise ValueError(f"std must be positive and finite, got {std}; use Uniform with close ends for a single time.")


def _check_shift(shift: float) -> None:
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite (1 = none; Wan 5, Qwen-Image 3), got {shift}.")
