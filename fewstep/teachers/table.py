"""What the families on a table of noise levels share: the table, DDIM's times on it, the place in a student's pipeline.

Whichever a teacher's scheduler, it is sampled by DDIM without fresh noise [arXiv:2010.02502], at the times that DDIM
has under that scheduler's spacing; t = i / 999.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import VPTable
from fewstep.teachers.base import FewSteps
from fewstep.types import Kind

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What diffusers' schedulers call the network's output -> what it is."""


def kind_of(scheduler: Any) -> Kind:
    """What the network predicts.  Raises ValueError for a scheduler that is no table of betas or changes x0."""
    config, name = scheduler.config, type(scheduler).__name__
    if "alphas_cumprod" not in vars(scheduler):
        raise ValueError(f"the scheduler {name} has no betas; this family needs one that has, such as DDIMScheduler")
    if config.get("thresholding"):
        raise ValueError("the scheduler's thresholding cannot be used here; set it to false")
    kind = config.get("prediction_type", "epsilon")
    if kind not in KINDS:
        raise ValueError(f"the scheduler's prediction_type {kind!r} is unknown here; known: {', '.join(KINDS)}")
    if kind == "epsilon" and config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr with prediction_type 'epsilon' cannot be used: at its last time the input is all "
            "noise, and noise says nothing about x0; such a model predicts 'v_prediction' or 'sample'"
        )
    return KINDS[kind]


def table_of(scheduler: Any) -> VPTable:
    """The scheduler's own levels."""
    levels = scheduler.alphas_cumprod.double()
    if levels[-1] == 0:
        levels[-1] = 1e-12  # zero terminal SNR, but for alpha = 1e-6: log-SNR must be finite
    return VPTable(tuple(levels.tolist()))


def ddim_grid(scheduler: Any) -> Callable[[int], Tensor]:
    """(steps) -> DDIM's own whole timesteps as the scheduler spaces them, then the end of its last step.

    That is index 0, the cleanest level of the table, or data if the scheduler's `set_alpha_to_one` says so.
    diffusers' DDIM always steps down by 1000 // steps, even where its next timestep is another (spacing "linspace", or
    "trailing" with steps that do not divide 1000); here a step ends where the next begins.
    """
    from diffusers import DDIMScheduler

    ddim: Any = DDIMScheduler(
        **_of(scheduler, "num_train_timesteps", "timestep_spacing", "steps_offset", "set_alpha_to_one")
    )
    last = len(scheduler.alphas_cumprod) - 1

    def grid(steps: int) -> Tensor:
        ddim.set_timesteps(steps)
        times = ddim.timesteps[ddim.timesteps > 0].double() / last
        if times[0] > 1:
            raise ValueError(f"this teacher's grid of {steps} steps starts beyond its last time; use {steps - 1} steps")
        # At exactly 0 `ode` would go on to predict data, which the pipeline does not.
        end = 0.0 if ddim.config.set_alpha_to_one else torch.finfo(torch.float32).tiny
        return torch.cat([times, times.new_tensor([end])]).float()

    return grid


def few_steps(part: str, **call: Any) -> FewSteps:
    """For a pipeline that takes whole `timesteps`.  part: its network.  call: its other arguments."""

    def set_up(pipe: Any, _levels: Tensor, told: Tensor, stochastic: bool) -> dict[str, Any]:
        pipe.scheduler = student_scheduler(pipe.scheduler, stochastic)
        return {"timesteps": [int(t) for t in told.round().tolist()], "guidance_scale": 1.0, **call}

    return FewSteps(part, set_up, seeded=True)


def student_scheduler(scheduler: Any, stochastic: bool) -> Any:
    """A scheduler for a student's steps on the same table.  stochastic: with fresh noise between them.

    Where a call names no times they are spaced evenly from the last one.
    """
    from diffusers import DPMSolverMultistepScheduler, LCMScheduler

    config = _of(
        scheduler,
        *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
        *("rescale_betas_zero_snr", "prediction_type"),
    )
    if stochastic:
        # LCM blends x0 with x_t by c_skip = 1 / (1 + (2 scaling t)^2), nothing in float32 at this scaling and t >= 1;
        # and every whole time is one of its own if it is said to come from as many steps as the table has.
        return LCMScheduler(
            **config, clip_sample=False, timestep_scaling=1e6, original_inference_steps=config["num_train_timesteps"]
        )
    # Of first order it is DDIM, and unlike DDIMScheduler it takes times as they are given.
    return DPMSolverMultistepScheduler(**config, solver_order=1, final_sigmas_type="zero", timestep_spacing="trailing")


def _of(scheduler: Any, *names: str) -> dict[str, Any]:
    """Those of the named settings that the scheduler has."""
    return {name: scheduler.config[name] for name in names if name in scheduler.config}
