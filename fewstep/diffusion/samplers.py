"""Samplers: plain functions of a callable, a noise tensor and a descending time grid.

The same functions run in training rollouts, evaluation and inference. `few_step` leaves gradients to its caller;
`ode` and `trajectory` integrate a frozen teacher and never record any.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from fewstep.diffusion.guidance import guided
from fewstep.diffusion.prediction import Denoise, Prediction
from fewstep.diffusion.schedules import EDM, NoiseSchedule, VPTable
from fewstep.diffusion.times import shift_time
from fewstep.types import Condition

Method = Literal["euler", "heun", "ddim"]


@dataclass(frozen=True, eq=False)
class State:
    """One step of a trajectory: the state, what the denoiser said about it, and where the step led.

    t, t_next: [B] float32 in [0, 1], 0 = data, t_next < t.  x_t, x_next: [B, ...], float32 or better.
    """

    t: Tensor
    x_t: Tensor
    prediction: Prediction
    t_next: Tensor
    x_next: Tensor


def time_grid(steps: int, shift: float = 1.0, *, clean_end: bool = False) -> Tensor:
    """Descending times 1, (N-1)/N, ..., 1/N, each through `shift_time`; with clean_end, also 0.

    Returns [N] float32 for `few_step`, [N + 1] for `ode` and `trajectory`.  (N = 4, k = 5: 1, .9375, .8333, .625.)
    """
    if steps < 1:
        raise ValueError(f"a sampler needs at least one step, got {steps}.")
    last = 0 if clean_end else 1
    return shift_time(torch.arange(steps, last - 1, -1, dtype=torch.float64) / steps, shift).float()


def student_grid(
    schedule: NoiseSchedule, num_steps: int, *, shift: float = 1.0, first: float = 1.0, start: float | None = None
) -> Tensor:
    """The times of a student's N sampling steps on its schedule, from noise down.

    `time_grid`, so 1, .75, .5, .25 for N = 4, in whole thousandths, because pipelines take integer timesteps of 1000
    and the exported student shall sample at the same times. On tables (VP; EDM as DMD's table of 1000) rounded down to
    an index, so that the network sees times it was trained at: 999, 749, 499, 249     [DMD2's code]
    first: what the first step is told in place of 1, its input being pure noise all the same.  Its x0 then follows
    with that time's alpha: 0.4, index 399, divides an error of eps by .65 where 999 divides it by .068     [DMD2, F.4]
    That is the paper's for one step; with more, ours: at least a fifth of the way from the second time to 1, so that
    0.4 becomes .8, .75, .5, .25 and one recipe fits every N.
    start: sigma / alpha of the first step, whose input is noise of that level, in place of pure noise.  The times are
    then those above times its time: for 2.5, on Stable Diffusion's table, 625, 468, 312, 156     [SiD-LSG's code]
    Returns [N] float32, descending.  Raises ValueError if two of the times fall on one thousandth, for a `start` that
    the schedule does not reach, or with a `first` as well.
    """
    if start is not None and first != 1:
        raise ValueError(f"a first step that starts at {start} is told its own time, not first={first}; leave one out.")
    grid = time_grid(num_steps, shift)
    grid[0] = first if num_steps == 1 else max(first, float(grid[1] + (1 - grid[1]) / 5))
    _check_grid(grid, least=1)
    top = 1.0 if start is None else _time_at(schedule, start)
    if isinstance(schedule, VPTable | EDM):
        last = (len(schedule.alphas_cumprod) if isinstance(schedule, VPTable) else 1000) - 1
        # A whole index may come out 6e-5 below itself, as its time is a float32: 748 / 999 * 999 would floor to 747.
        grid = (torch.floor(grid.double() * round(top * last) + 1e-4) / last).float()
    else:
        grid = ((grid.double() * top * 1000).round() / 1000).float()
    _check_grid(grid, least=1)
    return grid


def few_step(
    step: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    grid: Tensor,
    schedule: NoiseSchedule,
    *,
    draw: Callable[[int, Tensor], Tensor] | None = None,
) -> Tensor:
    """Sample with a few-step student: predict x0, re-noise it to the next time, repeat; returns the last x0.

    x_{t_{k+1}} = alpha x0_k + sigma eps, alpha and sigma at t_{k+1}     [DMD2, arXiv:2405.14867, section 4.5]

    draw(k, x0) gives fresh unit noise for the state entering step k = 1, 2, ...: stochastic sampling. draw=None keeps
    the noise that x_t and x0 imply, eps = (x_t - alpha x0) / sigma: DDIM, and on rectified flow an Euler step.

    step: (x_t [B, ...], t [B] float32) -> x0 [B, ...].  noise: [B, ...], the network's input at grid[0], already scaled
    (`schedule.prior` at t = 1).  grid: [N], times in (0, 1], descending.  Returns [B, ...] in step's dtype.
    """
    if grid.ndim != 1 or len(grid) < 1:
        raise ValueError(f"the grid must hold the student's N >= 1 times, got shape {tuple(grid.shape)}.")
    times = grid.to(noise.device, torch.float32)
    x_t, t = noise, times[0].repeat(len(noise))
    for k in range(1, len(times)):
        x0 = step(x_t, t)
        eps = Prediction(x0, x_t, t, "x0", schedule).eps if draw is None else draw(k, x0)
        t = times[k].repeat(len(noise))
        x_t = schedule.add_noise(x0, eps, t)
    return step(x_t, t)


@torch.no_grad()
def ode(
    denoiser: Denoise,
    noise: Tensor,
    grid: Tensor,
    cond: Condition,
    *,
    method: Method = "heun",
    guidance: float = 1.0,
) -> Tensor:
    """Integrate the probability-flow ODE along a grid of N + 1 times (the methods: see `trajectory`).

    Where the grid ends at t = 0 the result is x0: a schedule whose cleanest level still holds noise (VP, EDM tables)
    spends one more call, at t = 0, to predict it. Where the grid ends at t > 0 the result is the state x_t there.

    noise: [B, ...], the state at grid[0] (`schedule.prior` at t = 1).  grid: [N + 1] descending, in [0, 1].
    Returns noise's shape and dtype.
    """
    last = deque(trajectory(denoiser, noise, grid, cond, method=method, guidance=guidance), maxlen=1).pop()
    if float(grid[-1]) > 0 or _is_data(last.prediction.schedule, 0.0):
        return last.x_next.to(noise.dtype)
    return guided(denoiser, guidance)(last.x_next, last.t_next, cond).x0.to(noise.dtype)


@torch.no_grad()
def trajectory(
    denoiser: Denoise,
    noise: Tensor,
    grid: Tensor,
    cond: Condition,
    *,
    method: Method = "heun",
    guidance: float = 1.0,
) -> Iterator[State]:
    """The probability-flow ODE step by step: N states for a grid of N + 1 times.

    Every schedule's ODE is straight in a rescaled state:  d(x / alpha) / d(sigma / alpha) = eps, and the same curve
    d(x / n) / d(sigma / n) = flow with n = alpha + sigma.  Tables (VP, EDM) use the first, as EDM's sampler does; the
    others the second, which is regular at alpha = 0 and on rectified flow is dx / dt = flow.
    euler: one step in that variable; on rectified flow x + (t' - t) flow.
    heun: euler, then the mean of both ends' slopes (2 calls); a step onto data (sigma = 0) stays euler, since slopes
    need not exist there     [EDM, arXiv:2206.00364, algorithm 1]
    ddim: alpha' x0 + sigma' eps, equal to euler but for rounding     [DDIM, arXiv:2010.02502]

    noise: [B, ...], the state at grid[0].  grid: [N + 1] descending, in [0, 1].
    The state is carried, and handed over, in float32 or better; a low-precision network casts its own input.
    """
    if method not in get_args(Method):
        raise ValueError(f"no sampling method {method!r}; known: {', '.join(get_args(Method))}.")
    _check_grid(grid, least=2)
    denoise, times = guided(denoiser, guidance), grid.float().tolist()
    x_t = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for time, time_next in pairwise(times):
        t = torch.full((len(noise),), time, device=noise.device)
        t_next = torch.full_like(t, time_next)
        here = denoise(x_t, t, cond)
        x_next = _ddim(here, t_next).to(x_t.dtype) if method == "ddim" else _euler(here, x_t, t_next)
        if method == "heun" and not _is_data(here.schedule, time_next):
            there = denoise(x_next, t_next, cond)
            x_next = _euler(here, x_t, t_next, also=there)
        yield State(t, x_t, here, t_next, x_next)
        x_t = x_next


def _ddim(here: Prediction, t_next: Tensor) -> Tensor:
    c = here.schedule.at(t_next.to(here.x0.dtype)).like(here.x_t)
    return c.alpha * here.x0 + c.sigma * here.eps


def _euler(here: Prediction, x_t: Tensor, t_next: Tensor, also: Prediction | None = None) -> Tensor:
    """x'/n' = x/n + (sigma'/n' - sigma/n) slope; slope is the mean of both predictions' if there are two."""
    schedule, table = here.schedule, isinstance(here.schedule, VPTable | EDM)
    now, then = schedule.at(here.t.double()).like(x_t), schedule.at(t_next.double()).like(x_t)
    n, n_next = (now.alpha, then.alpha) if table else (now.alpha + now.sigma, then.alpha + then.sigma)
    slopes = [p.eps if table else p.flow for p in (here, also) if p is not None]
    stride = n_next * (then.sigma / n_next - now.sigma / n)
    return (n_next / n).to(x_t.dtype) * x_t + stride.to(x_t.dtype) * (sum(slopes[1:], slopes[0]) / len(slopes))


def _time_at(schedule: NoiseSchedule, ratio: float) -> float:
    """The time where sigma / alpha is `ratio`.  Raises ValueError if the schedule has none."""
    ends = schedule.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = (ends.sigma / ends.alpha).tolist()
    if not (ratio > 0 and low <= ratio <= high):
        raise ValueError(f"this schedule has no sigma / alpha = {ratio} to start at: {low:.3g} to {high:.3g}.")
    return float(schedule.time_of(torch.tensor([-2 * math.log(ratio)], dtype=torch.float64)))


def _is_data(schedule: NoiseSchedule, time: float) -> bool:
    """Whether the schedule holds no noise at this time."""
    return float(schedule.at(torch.tensor([time])).sigma) == 0.0


def _check_grid(grid: Tensor, least: int) -> None:
    fits = grid.ndim == 1 and len(grid) >= least
    if not fits or not bool(((grid >= 0) & (grid <= 1)).all()) or not bool((grid.diff() < 0).all()):
        raise ValueError(f"a grid is {least} or more strictly descending times in [0, 1], got {grid.tolist()}.")
