"""What the families on rectified flow share: their scheduler's times, and its place in a student's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.teachers.base import FewSteps


def times(scheduler: Any, mu: float | None, steps: int, sigmas: Sequence[float] | None = None) -> Tensor:
    """The scheduler's own levels, [steps + 1] descending to 0; the network is told 1000 times them.

    mu: its dynamic shift, used if its config asks for one.  sigmas: [steps] before the shift, if the pipeline gives
    them.
    """
    told = {} if sigmas is None else {"sigmas": list(sigmas)}
    shift = {"mu": mu} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(steps, **told, **shift)
    return scheduler.sigmas.clone()


def dynamic_mu(scheduler: Any, tokens: int, base: float = 0.5, most: float = 1.16) -> float:
    """The shift by which a picture of so many tokens is sampled: a line through those of two sizes.

    base, most: where the scheduler's config does not name them.
    """
    config = scheduler.config
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    base, most = config.get("base_shift", base), config.get("max_shift", most)
    return base + (tokens - low) * (most - base) / (high - low)


def few_steps(
    call: Callable[[Any], dict[str, Any]] = lambda pipe: {"guidance_scale": 1.0}, *, packed: bool = False
) -> FewSteps:
    """For a pipeline that takes `sigmas` and tells its network 1000 times them.  call: its other arguments.

    packed: whether it carries latents as tokens.
    """

    def set_up(pipe: Any, levels: Tensor, _told: Tensor, stochastic: bool) -> dict[str, Any]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # No shift of the scheduler's own: the levels that the call names are final.
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
        return {"num_inference_steps": len(levels), "sigmas": levels.tolist(), **call(pipe)}

    return FewSteps("transformer", set_up, seeded=False, whole=False, packed=packed)
