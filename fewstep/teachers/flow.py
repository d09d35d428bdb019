"""What the families on rectified flow share: their scheduler's times, and its place in a student's pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fewstep.teachers.base import FewSteps


def check_levels(scheduler: Any) -> None:
    """Raise ValueError for a scheduler without flow's levels, or that shifts them by the sample's size."""
    name, config = type(scheduler).__name__, scheduler.config
    flows = name.startswith("FlowMatch") or config.get("use_flow_sigmas")
    if not flows or config.get("use_dynamic_shifting"):
        raise ValueError(
            f"the scheduler {name} must have flow's levels (use_flow_sigmas) and no shift by the sample's size "
            "(use_dynamic_shifting)"
        )


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
    call: Callable[[Any], dict[str, Any]] = lambda pipe: {"guidance_scale": 1.0},
    *,
    packed: bool = False,
    seeded: bool = False,
) -> FewSteps:
    """For a pipeline that takes `sigmas` and tells its network 1000 times them.  call: its other arguments.

    packed: whether it carries latents as tokens.  seeded: whether it hands its generator to the scheduler.
    """

    def set_up(pipe: Any, levels: Tensor, _told: Tensor, stochastic: bool) -> dict[str, Any]:
        from diffusers import FlowMatchEulerDiscreteScheduler

        # No shift of the scheduler's own: the levels that the call names are final.
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
        return {"num_inference_steps": len(levels), "sigmas": levels.tolist(), **call(pipe)}

    return FewSteps("transformer", set_up, seeded=seeded, tells=lambda told: told, packed=packed)


def curved_scheduler(levels: Tensor, stochastic: bool) -> Any:
    """A scheduler whose own times are these levels [N], for a pipeline whose call takes none.

    Its N levels lie evenly from 1 to almost 0, are shifted, and stretched to end at `shift_terminal`.  With w = 1 - t a
    shift and a stretch give 1 / w_i = a / i + b / (N - 1), for any a and b: as are a student's levels, whatever its own
    shift, up to their rounding to thousandths.  Here they go through the first, middle and last level, so that up to
    three are exact.
    Raises ValueError for levels that do not begin at 1.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    count, shift = len(levels), 1.0
    end: dict[str, Any] = {"shift_terminal": float(levels[-1])} if count > 1 else {}
    if abs(float(levels[0]) - 1) > 1e-6:
        raise ValueError(
            f"this pipeline begins at time 1, and the student at {float(levels[0]):g}; use it through "
            "fewstep.load_student, or distil with method.first_time=1, or SiD's method.init_sigma=null"
        )
    if count > 2:
        i, j = count // 2, count - 1
        at_i, at_j = (1 / (1 - float(levels[k])) for k in (i, j))
        a = (at_i - at_j) / (1 / i - 1 / j)
        b = (at_j - a / j) * j
        # Under a shift k, "almost 0" is k / (999 + k); hence b k^2 + 999 (a + b) k = 999 a.
        half = 999 * (a + b) / 2
        shift = 999 * a / (half + (half**2 + 999 * a * b) ** 0.5)
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=stochastic, **end)


def curved(levels: Tensor) -> Tensor:
    """The levels [N] of `curved_scheduler`."""
    scheduler = curved_scheduler(levels, stochastic=False)
    scheduler.set_timesteps(len(levels))
    return scheduler.sigmas[:-1]
