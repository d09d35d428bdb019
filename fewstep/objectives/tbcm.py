"""TBCM: consistency distillation on the teacher's own trajectories (arXiv:2511.20410)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion import RectifiedFlow, match, shift_time
from fewstep.models.trio import Trio
from fewstep.objectives.base import check_positive, register_objective
from fewstep.objectives.consistency import TRIG, Consistency, Pairs, teacher_velocity
from fewstep.rng import Rng
from fewstep.types import Batch, Need


@register_objective("tbcm")
@dataclass(frozen=True, kw_only=True)
class TBCM(Consistency):
    """Consistency distillation without data: the teacher samples from noise, and where it comes by the student learns.

    The states of the trajectories make one batch, `trajectory_pairs` times the micro-batch (all: grid_steps - 1 times).
    Each sample has times of its own, one in each interval of the grid; in the paper's code a process has one sample.
    As in that code, known to us better than the paper's text.  Not here: guidance that the student is told, drawn for
    each sample.  Its calm-down of the term that feeds on the student trades the exact answer for stability:
    with r below 1 the consistency function is no longer where the loss rests (DERIVED).
    Two steps have the paper's middle angle of 1.0 on rectified flow with student_shift tan(1) = 1.56; on tables (VP,
    EDM) the shift moves an index, and the angle is another.
    """

    grid_steps: int = 16  # the teacher's sampling steps, K; TBCM's code
    grid_shift: float = 2.5  # flow shift of their grid; TBCM's code
    trajectory_pairs: int | None = None  # of a trajectory, at random; none = all that there are; TBCM's code
    black_filter: bool = False  # leave out trajectories that end in black pictures, see `passed`; TBCM's code: True
    calm_start: int = 15_000  # iteration at which r falls from 1; TBCM's code
    calm_steps: int = 2000  # within so many; TBCM's code
    calm_r: float = 0.75  # to this; 1 = no calm-down; TBCM's code

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_steps < 2:
            raise ValueError(f"grid_steps must be >= 2, got {self.grid_steps}: at the first there is nothing to learn")
        if self.trajectory_pairs is not None and not 1 <= self.trajectory_pairs < self.grid_steps:
            raise ValueError(
                f"trajectory_pairs must be 1 to grid_steps - 1 = {self.grid_steps - 1}, or null for all, "
                f"got {self.trajectory_pairs}"
            )
        check_positive(self, "grid_shift", "calm_steps")
        if not 0 <= self.calm_r <= 1 or self.calm_start < 0:
            raise ValueError(f"calm_r must be in [0, 1] and calm_start >= 0, got {self.calm_r} and {self.calm_start}")

    @property
    def needs(self) -> frozenset[Need]:
        """Prompts alone, and what black looks like."""
        return frozenset({"jvp", "black"} if self.black_filter else {"jvp"})

    def share(self, iteration: int) -> float:
        """r: warmed up, and from `calm_start` on brought down to `calm_r`     [TBCM's code]"""
        calm = min(max((iteration - self.calm_start) / self.calm_steps, 0.0), 1.0)
        return super().share(iteration) * (1 - calm) + self.calm_r * calm

    @torch.no_grad()
    def pairs(self, trio: Trio, batch: Batch, rng: Rng) -> Pairs:
        """The guided teacher's DDIM trajectory from noise, without its start; state by state, each of the whole batch.

        x' = cos(a - a') x - sin(a - a') v
        """
        velocity, x = teacher_velocity(trio, self.guidance), rng.randn("tbcm.noise", batch.shape)
        times = jittered(reference_grid(self.grid_steps, self.grid_shift), rng, x.device)
        states, velocities = [], []
        for i, t in enumerate(times):
            v = velocity(x, t, batch.cond)
            states.append(x)
            velocities.append(v)
            if i + 1 < len(times):
                c = TRIG.at((t - times[i + 1]).to(x.dtype)).like(x)
                x = c.alpha * x - c.sigma * v
        chosen = self.chosen(len(batch), rng).to(x.device)
        rows = torch.arange(len(batch), device=x.device).repeat(len(chosen))

        def picked(made: list[Tensor] | Tensor) -> Tensor:
            stacked = made if isinstance(made, Tensor) else torch.stack(made)
            return stacked[chosen.flatten(), rows]

        keep = None
        if self.black_filter:
            c = TRIG.at(times[-1].to(x.dtype)).like(x)
            keep = self.passed(c.alpha * x - c.sigma * velocities[-1], trio.sight().black, rng)[rows]
        return Pairs(picked(states), picked(times), picked(velocities), batch.cond[rows], keep)

    @staticmethod
    def passed(x0: Tensor, black: Tensor | None, rng: Rng) -> Tensor:
        """1 for samples that pass for pictures, [B]: with probability min(1, mean |x0 - black|^2)     [TBCM's code]

        x0: [B, ...], where the trajectories end.  black: [1, ...], a black picture.  Raises ValueError without one.
        """
        if black is None:
            raise ValueError("nothing tells here what black is; the objective's `needs` must contain 'black'")
        distance = (x0 - black.to(x0)).square().flatten(1).mean(1)
        return (rng.rand("tbcm.black") < distance).to(x0)

    def chosen(self, size: int, rng: Rng) -> Tensor:
        """Which states of its trajectory each sample gives, [P, size] in 1..grid_steps - 1; never the start.

        There cos is 0, and so is all that the loss could say.
        """
        if self.trajectory_pairs is None:
            return torch.arange(1, self.grid_steps)[:, None].expand(-1, size)
        order = rng.randn("tbcm.pairs", (self.grid_steps - 1,)).argsort(1)
        return order[:, : self.trajectory_pairs].T + 1


def reference_grid(steps: int, shift: float = 2.5) -> Tensor:
    """The teacher's times on TrigFlow, [steps] float64 descending from 1.     [TBCM's code]

    sigma = shift j / 1000, for j = 1000 to 1;  equal steps between these ends, shifted again;  a = atan(s / (1 - s))
    In angles, for 16: 1.5708, 1.5423, 1.5095, ..., .1832, .0063.
    """
    low, high = shift_time(torch.tensor([0.001, 1.0], dtype=torch.float64), shift).tolist()
    sigma = shift_time(torch.linspace(high, low, steps, dtype=torch.float64), shift)
    return match(sigma, RectifiedFlow(), TRIG)[0]


def jittered(grid: Tensor, rng: Rng, device: torch.device) -> Tensor:
    """Times of each sample's own, [steps, B] float32 on `device`: the first is the grid's, T_i ~ U(grid_i, grid_i-1).

    grid: [steps] descending.  So each sample's descend, too.  A normal's distribution function is uniform.
    """
    u = torch.special.ndtr(rng.randn("tbcm.t", (len(grid) - 1,)).double().cpu()).T
    inner = grid[1:, None] + (grid[:-1] - grid[1:])[:, None] * u
    return torch.cat([grid[:1, None].expand(1, u.shape[1]), inner]).to(device, torch.float32)
