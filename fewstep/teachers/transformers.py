"""Pipelines whose network is a transformer on rectified flow: CogView4."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import RectifiedFlow, shift_time
from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Denoiser
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import FewSteps, Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.pipelines import FAMILIES, resized


@FAMILIES.register("CogView4Pipeline")
def cogview4(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """CogView4: one transformer, one text encoder, rectified flow; t is the time after its scheduler's shift.

    resolution: pixels of a side, by default those of its config.
    """
    transformer = pipe.transformer.config
    native = (transformer.in_channels, transformer.sample_size, transformer.sample_size)
    shape = resized(native, resolution, pipe.vae_scale_factor, transformer.patch_size)
    mu = _mu(pipe, shape[-1])

    def encode(prompt: str) -> dict[str, Tensor]:
        # Its default device is that of any component, which need not be the encoder's.
        place = pipe.text_encoder.device
        text, _ = pipe.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=_longest(pipe), device=place
        )
        return {"text": text}

    def grid(steps: int) -> Tensor:
        """CogView4Pipeline's own times: integers from 1000 down to 1, shifted by the scheduler, then 0."""
        indices = torch.linspace(1000, 1, steps, dtype=torch.float64).long().tolist()
        pipe.scheduler.set_timesteps(timesteps=indices, sigmas=[i / 1000 for i in indices], mu=mu)
        return pipe.scheduler.sigmas.clone()

    return Teacher(
        denoiser=Denoiser(
            ShiftedCogView4(pipe.transformer, pipe.vae_scale_factor, _shift(pipe, mu)), RectifiedFlow(), "flow"
        ),
        encode=PipelineEncoder(encode),
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=grid,
        guidance=5.0,
        few_steps=FewSteps("transformer", _few_steps, seeded=False),
        lpips=vgg_lpips,
    )


def _few_steps(pipe: Any, levels: Tensor, told: Tensor, stochastic: bool) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    # No shift of the scheduler's own: the times that the call names are final.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    whole = told.round()
    return {
        "num_inference_steps": len(levels),
        "timesteps": [int(t) for t in whole.tolist()],
        **({} if torch.allclose(whole / 1000, levels) else {"sigmas": levels.tolist()}),
        "guidance_scale": 1.0,
        "max_sequence_length": _longest(pipe),
    }


def _longest(pipe: Any) -> int:
    """The pipeline's default of tokens, less for a small encoder."""
    return min(pipe.tokenizer.model_max_length, 1024)


class ShiftedCogView4(CogView4):
    """CogView4 as its pipeline calls it: the scheduler shifts the noise level, but the network is told the time before.

    t = k u / (1 + (k - 1) u) is the noise level, u * 1000 what the network was trained with.
    """

    def __init__(self, module: nn.Module, vae_scale: int, shift: float) -> None:
        super().__init__(module, vae_scale)
        self.shift = shift

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000."""
        return super().network_time(shift_time(t, 1 / self.shift))


def _shift(pipe: Any, mu: float | None) -> float:
    """The factor k by which the pipeline's scheduler shifts times.  Raises ValueError for other spacings.

    mu: the dynamic shift, if it has one.
    """
    config = pipe.scheduler.config
    names = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    used = [name for name in names if config.get(name)]
    if used:
        raise ValueError(f"the scheduler's {', '.join(used)} cannot be used here; its times must only be shifted")
    if mu is None:
        return float(config.get("shift", 1.0))
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def _mu(pipe: Any, side: int) -> float | None:
    """The scheduler's dynamic shift for latents of that side, if it has one."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    tokens = (side // pipe.transformer.config.patch_size) ** 2
    return calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("base_shift", 0.25), config.get("max_shift", 0.75)
    )
