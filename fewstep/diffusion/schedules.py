"""Noise schedules: how much signal and how much noise x_t = alpha x0 + sigma eps holds at time t in [0, 1].

t = 0 is the data end, t = 1 the noise end. Everything is computed in float64 and returned in float32 or better: the
coefficients are [B] numbers, so this costs nothing, and log-SNR differences need the digits.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


def like(value: Tensor, x: Tensor) -> Tensor:
    """Reshape one number per sample so that it multiplies x sample by sample.

    value: [B].  x: [B, ...].  Returns a view [B, 1, ...] of value.
    Raises ValueError unless value has x's batch size: broadcasting [B] against [..., W] would be silent when B == W.
    """
    if value.shape != x.shape[:1]:
        raise ValueError(f"one value per sample is needed: got shape {tuple(value.shape)} for x {tuple(x.shape)}.")
    return value.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True, eq=False)
class Coefficients:
    """alpha, sigma of x_t = alpha x0 + sigma eps, and their derivatives by t (our t in [0, 1]).

    Each [B], float32 or float64; [B, 1, ...] once `like` has shaped them.
    """

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def log_snr(self) -> Tensor:
        """log(alpha^2 / sigma^2): falls with t; +inf where sigma = 0, -inf where alpha = 0."""
        return 2 * (self.alpha.log() - self.sigma.log())

    def like(self, x: Tensor) -> "Coefficients":
        """Shape all four to multiply x: [B] -> [B, 1, ...] (see the function `like`)."""
        return self._each(lambda value: like(value, x))

    def to(self, dtype: torch.dtype) -> "Coefficients":
        return self._each(lambda value: value.to(dtype))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Coefficients":
        return Coefficients(change(self.alpha), change(self.sigma), change(self.d_alpha), change(self.d_sigma))


@runtime_checkable
class NoiseSchedule(Protocol):
    """A family x_t = alpha(t) x0 + sigma(t) eps with SNR falling in t. Inherit and give `curve` and `time_of`."""

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, d alpha/dt, d sigma/dt.  t: [B] float64 in [0, 1], 0 = data.  Each [B] float64."""
        ...

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The time with this log-SNR; what lies outside the schedule's range is clamped to its nearer end.

        log_snr: [B], +-inf allowed.  Returns [B] in [0, 1], float32 or better.
        """
        ...

    def at(self, t: Tensor) -> Coefficients:
        """Coefficients at time t.  t: [B] floating, in [0, 1], 0 = data.  Each [B] in t's dtype, float32 at least."""
        if t.ndim != 1 or not t.is_floating_point():
            raise ValueError(f"t must be [B] floating in [0, 1], got {t.dtype} {tuple(t.shape)}; index i is i / 999.")
        return Coefficients(*self.curve(t.double())).to(torch.promote_types(t.dtype, torch.float32))

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Carry clean data to time t:  x_t = alpha x0 + sigma eps.

        x0, eps: [B, ...], any float dtype.  t: [B] float32 in [0, 1], 0 = data.  Returns x0's shape and dtype; the sum
        is taken in float32 or better.
        """
        dtype = torch.promote_types(x0.dtype, torch.float32)
        c = self.at(t.to(dtype)).like(x0)
        return (c.alpha * x0.to(dtype) + c.sigma * eps.to(dtype)).to(x0.dtype)

    def between(self, s: Tensor, t: Tensor) -> Coefficients:
        """Coefficients of the step from time s to a noisier time t >= s:  x_t = alpha_ts x_s + sigma_ts eps.

        alpha_ts = alpha_t / alpha_s,  sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2     [Phased DMD, arXiv:2510.27684]

        s, t: [B] floating in [0, 1], 0 = data.  Each [B] float64; derivatives by t, not finite where t = s.
        Where t < s the variance is negative and sigma_ts is NaN: nothing is clamped.
        """
        s, t = s.double(), t.double()
        c_s, c_t, same = self.at(s), self.at(t), s == t
        alpha = torch.where(same, 1.0, c_t.alpha / c_s.alpha)
        # sigma_t^2 (1 - SNR_t / SNR_s) is the same variance without the difference of two near-equal squares.
        gap = torch.where(same, 0.0, c_t.log_snr - c_s.log_snr)
        sigma = c_t.sigma * (-torch.expm1(gap)).sqrt()
        d_alpha = c_t.d_alpha / c_s.alpha
        d_sigma = (c_t.sigma * c_t.d_sigma - alpha * d_alpha * c_s.sigma**2) / sigma
        return Coefficients(alpha, sigma, d_alpha, d_sigma)

    def renoise(self, x_s: Tensor, eps: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Carry a sample from time s to a noisier time t >= s.

        x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2) eps     [arXiv:2510.27684]

        x_s, eps: [B, ...], any float dtype.  s, t: [B] float32 in [0, 1], 0 = data.  Returns x_s's shape and dtype.
        Raises ValueError if any t < s: the variance would be negative. On an accelerator the test would cost a
        synchronisation, so such a sample comes out NaN there, and the trainer's non-finite count reports it.
        """
        if s.device.type == "cpu" and bool((t < s).any()):
            raise ValueError(f"renoise only adds noise: t >= s is needed, got s={s.tolist()}, t={t.tolist()}.")
        dtype = torch.promote_types(x_s.dtype, torch.float32)
        c = self.between(s, t).to(dtype).like(x_s)
        return (c.alpha * x_s.to(dtype) + c.sigma * eps.to(dtype)).to(x_s.dtype)

    def prior(self, eps: Tensor) -> Tensor:
        """The network's input at t = 1, from unit noise.  eps: [B, ...].  Returns its shape and dtype."""
        return eps


@dataclass(frozen=True)
class VPTable(NoiseSchedule):
    """Variance preserving table (DDPM, SD):  alpha = sqrt(acp_i), sigma = sqrt(1 - acp_i) at t = i / (N - 1).

    Between indices log-SNR is linear in t, and the derivatives are that interpolation's (one-sided at an index). at(0)
    is the cleanest tabulated level (SD: sigma .029), not data. Zero-terminal-SNR tables are refused.
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)

    def __post_init__(self) -> None:
        acp = self.alphas_cumprod
        if len(acp) < 2 or not (acp[0] < 1 and acp[-1] > 0) or any(a <= b for a, b in pairwise(acp)):
            raise ValueError(
                f"alphas_cumprod must fall strictly within (0, 1), got {len(acp)} entries, {acp[:1]} to {acp[-1:]}; "
                "a zero-terminal-SNR table ends in 0, where log-SNR is infinite: replace that entry by 1e-8."
            )
        _ = self._log_snr

    @classmethod
    def from_betas(cls, betas: Sequence[float]) -> "VPTable":
        """acp_i = prod_{j <= i} (1 - beta_j).  betas: N numbers in (0, 1), from the data end to the noise end."""
        return cls(tuple((1 - torch.tensor(list(betas), dtype=torch.float64)).cumprod(0).tolist()))

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, count: int = 1000) -> "VPTable":
        """DDPM's betas, equally spaced (DiT, PixArt-alpha)."""
        return cls.from_betas(torch.linspace(beta_start, beta_end, count, dtype=torch.float64).tolist())

    @classmethod
    def scaled_linear(cls, beta_start: float = 0.00085, beta_end: float = 0.012, count: int = 1000) -> "VPTable":
        """Stable Diffusion's betas, whose square roots are equally spaced (SD 1.5, SD 2.1, SDXL)."""
        roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), count, dtype=torch.float64)
        return cls.from_betas((roots**2).tolist())

    @cached_property
    def _log_snr(self) -> Tensor:
        return torch.logit(torch.tensor(self.alphas_cumprod, dtype=torch.float64))

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        table = self._log_snr.to(t.device, non_blocking=True)
        position = t * (len(table) - 1)
        left = position.detach().floor().long().clamp(0, len(table) - 2)
        rise = table[left + 1] - table[left]
        log_snr = table[left] + (position - left) * rise
        alpha, sigma = torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()
        slope = 0.5 * rise * (len(table) - 1)
        return alpha, sigma, slope * alpha * sigma**2, -slope * sigma * alpha**2

    def time_of(self, log_snr: Tensor) -> Tensor:
        table = self._log_snr.to(log_snr.device, non_blocking=True)
        wanted = log_snr.double().clamp(table[-1], table[0])
        # The table falls; searchsorted wants a rising one.
        left = (torch.searchsorted(-table, -wanted.detach(), right=True) - 1).clamp(0, len(table) - 2)
        position = left + (wanted - table[left]) / (table[left + 1] - table[left])
        return (position / (len(table) - 1)).to(torch.promote_types(log_snr.dtype, torch.float32))


@dataclass(frozen=True)
class RectifiedFlow(NoiseSchedule):
    """alpha = 1 - t, sigma = t (SD3, Flux, Sana, Wan). Shifts belong to the time law or the sampling grid, not here."""

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        one = torch.ones_like(t)
        return 1 - t, t, -one, one

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-0.5 * log_snr.double()).to(torch.promote_types(log_snr.dtype, torch.float32))


@dataclass(frozen=True)
class EDM(NoiseSchedule):
    """alpha = 1, sigma(t) = (smin^(1/rho) + t (smax^(1/rho) - smin^(1/rho)))^rho     [EDM, arXiv:2206.00364, eq. 5]

    At t = i/999 this is DMD's 1000-entry Karras table in ascending order. at(0) is sigma_min, not data. sigma_data is
    not part of the curve; the denoising loss's weight reads it here.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0 and self.sigma_data > 0):
            raise ValueError(f"EDM needs 0 < sigma_min < sigma_max, rho > 0 and sigma_data > 0, got {self}.")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low, high = self._ends
        root = low + t * (high - low)
        d_sigma = self.rho * (high - low) * root ** (self.rho - 1)
        return torch.ones_like(t), root**self.rho, torch.zeros_like(t), d_sigma

    def time_of(self, log_snr: Tensor) -> Tensor:
        low, high = self._ends
        sigma = (-0.5 * log_snr.double()).exp().clamp(self.sigma_min, self.sigma_max)
        t = ((sigma ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)
        return t.to(torch.promote_types(log_snr.dtype, torch.float32))

    def prior(self, eps: Tensor) -> Tensor:
        return self.sigma_max * eps


@dataclass(frozen=True)
class TrigFlow(NoiseSchedule):
    """alpha = cos(angle), sigma = sigma_d sin(angle), angle = t pi / 2     [sCM, arXiv:2410.11081, section 3]

    Derivatives are by our t, hence a factor pi/2 against the paper's. eps is unit noise here (the paper's z is
    sigma_d eps), so the paper's network sigma_d F = cos z - sin x0 is our v only for sigma_d = 1.
    """

    sigma_d: float = 1.0

    def __post_init__(self) -> None:
        if self.sigma_d <= 0:
            raise ValueError(f"sigma_d must be positive (the data's standard deviation), got {self.sigma_d}.")

    def curve(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # cos(angle) as a sine of the complement: exactly 0 at t = 1, where cos(pi / 2) leaves 6e-17.
        cos, sin = torch.sin((1 - t) * (math.pi / 2)), torch.sin(t * (math.pi / 2))
        return cos, self.sigma_d * sin, -math.pi / 2 * sin, math.pi / 2 * self.sigma_d * cos

    def time_of(self, log_snr: Tensor) -> Tensor:
        angle = torch.atan((-0.5 * log_snr.double()).exp() / self.sigma_d)
        return (angle * (2 / math.pi)).to(torch.promote_types(log_snr.dtype, torch.float32))

    def prior(self, eps: Tensor) -> Tensor:
        return self.sigma_d * eps


def match(t: Tensor, source: NoiseSchedule, target: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """Time on `target` with the SNR that t has on `source`, and the factor that turns one's states into the other's.

    x_target = c x_source,  c = alpha_target / alpha_source = sigma_target / sigma_source.
    c is computed as a ratio of sqrt(alpha^2 + sigma^2): equal to both, and finite also where alpha or sigma is 0.

    t: [B] floating in [0, 1] on source.  Returns (time on target, c), each [B] in t's dtype, float32 at least. An SNR
    that target does not reach is clamped to its nearer end (rectified flow t = 1 seen by a VP table is index 999).
    """
    here = source.at(t.double())
    time = target.time_of(here.log_snr)
    there = target.at(time)
    scale = torch.hypot(there.alpha, there.sigma) / torch.hypot(here.alpha, here.sigma)
    dtype = torch.promote_types(t.dtype, torch.float32)
    return time.to(dtype), scale.to(dtype)
