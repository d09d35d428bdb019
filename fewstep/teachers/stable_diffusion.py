"""Pipelines whose network is a UNet on a table of noise levels: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import VPTable
from fewstep.models.backbones import UNet2DCondition, UNet2DConditionXL
from fewstep.models.denoiser import Backbone, Denoiser
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import FewSteps, PromptEncoder, Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.types import Kind

KINDS: dict[str, Kind] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
"""What diffusers' schedulers call the network's output -> what it is."""


@FAMILIES.register("StableDiffusionPipeline")
def stable_diffusion(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Stable Diffusion 1.x and 2.x: a UNet and one text encoder.

    resolution: pixels of a side, by default those of its config.
    """
    _check_unet(pipe.unet)

    def encode(prompt: str) -> dict[str, Tensor]:
        return {"text": pipe.encode_prompt(prompt, pipe.text_encoder.device, 1, False)[0]}

    return _unet(pipe, source, UNet2DCondition, PipelineEncoder(encode), resolution, guidance=7.5)


@FAMILIES.register("StableDiffusionXLPipeline")
def stable_diffusion_xl(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Stable Diffusion XL: a UNet that hears of the picture's size, and two text encoders.

    Guidance leads away from zeros, as its pipeline does if its force_zeros_for_empty_prompt says so, and as in DMD2;
    else from the empty prompt.  resolution: pixels of a side, by default those of its config.
    """
    _check_unet(pipe.unet, told="text_time")

    def encode(prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, device=pipe.text_encoder_2.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    encoder = PipelineEncoder(encode, zeros=pipe.config.force_zeros_for_empty_prompt)
    backbone = partial(UNet2DConditionXL, vae_scale=pipe.vae_scale_factor)
    return _unet(pipe, source, backbone, encoder, resolution, guidance=5.0)


def _unet(
    pipe: Any,
    source: str,
    backbone: Callable[..., UNet2DCondition],
    encode: PipelineEncoder,
    resolution: int | None,
    *,
    guidance: float,
) -> Teacher:
    """The teacher of a pipeline's UNet.  backbone: (the UNet, its last time's index) -> its call adapter."""
    config = pipe.unet.config
    size, halvings = config.sample_size, len(config.block_out_channels) - 1
    sides = (size, size) if isinstance(size, int) else tuple(size)
    shape = resized((config.in_channels, *sides), resolution, pipe.vae_scale_factor, 2**halvings)
    few_steps = FewSteps("unet", _few_steps, seeded=True)
    return on_table(pipe, source, partial(backbone, pipe.unet), encode, shape, guidance=guidance, few_steps=few_steps)


def on_table(
    pipe: Any,
    source: str,
    backbone: Callable[[int], Backbone],
    encode: PromptEncoder,
    shape: tuple[int, ...],
    *,
    guidance: float,
    few_steps: FewSteps,
    prompts: Sequence[str] = (),
) -> Teacher:
    """A teacher on its scheduler's own betas; t = i / 999.

    backbone: the last time's index -> the network's call adapter.  shape: of its latents.
    Whichever its scheduler, it is sampled by DDIM without fresh noise [arXiv:2010.02502], at that scheduler's times.
    """
    kind, ddim = _kind(pipe.scheduler), _ddim(pipe.scheduler)
    levels = pipe.scheduler.alphas_cumprod.double()
    if levels[-1] == 0:
        levels[-1] = 1e-12  # zero terminal SNR, but for alpha = 1e-6: log-SNR must be finite
    schedule, last = VPTable(tuple(levels.tolist())), len(levels) - 1

    def grid(steps: int) -> Tensor:
        """DDIM's own whole timesteps, then the end of its last step.

        That is index 0, the cleanest level of the table, or data if the scheduler's `set_alpha_to_one` says so.
        diffusers' DDIM always steps down by 1000 // steps, even where its next timestep is another (spacing "linspace",
        or "trailing" with steps that do not divide 1000); here a step ends where the next begins.
        """
        ddim.set_timesteps(steps)
        times = ddim.timesteps[ddim.timesteps > 0].double() / last
        if times[0] > 1:
            raise ValueError(f"this teacher's grid of {steps} steps starts beyond its last time; use {steps - 1} steps")
        # At exactly 0 `ode` would go on to predict data, which the pipeline does not.
        end = 0.0 if ddim.config.set_alpha_to_one else torch.finfo(torch.float32).tiny
        return torch.cat([times, times.new_tensor([end])]).float()

    return Teacher(
        denoiser=Denoiser(backbone(last), schedule, kind),
        encode=encode,
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=prompts,
        grid=grid,
        solver="ddim",
        guidance=guidance,
        few_steps=few_steps,
        lpips=vgg_lpips,
    )


def _few_steps(pipe: Any, levels: Tensor, told: Tensor, stochastic: bool) -> dict[str, Any]:
    pipe.scheduler = student_scheduler(pipe.scheduler, stochastic)
    return {"timesteps": [int(t) for t in told.round().tolist()], "guidance_scale": 1.0}


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


def _kind(scheduler: Any) -> Kind:
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


def _ddim(scheduler: Any) -> Any:
    """DDIM's times as the pipeline's scheduler spaces them."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        **_of(scheduler, "num_train_timesteps", "timestep_spacing", "steps_offset", "set_alpha_to_one")
    )


def _of(scheduler: Any, *names: str) -> dict[str, Any]:
    """Those of the named settings that the scheduler has."""
    return {name: scheduler.config[name] for name in names if name in scheduler.config}


def _check_unet(unet: Any, told: str | None = None) -> None:
    """Raises ValueError for a UNet that is told more than time and text, or paints into a given picture.

    told: the addition_embed_type that the family has.
    """
    config = unet.config
    more = ("time_cond_proj_dim", "class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
    used = [name for name in more if config.get(name) is not None]
    used += ["addition_embed_type"] if config.get("addition_embed_type") != told else []
    if used:
        raise ValueError(
            f"the UNet's {', '.join(used)} cannot be used here; it must be told time and text only"
            + (f", and have addition_embed_type {told!r}" if told else "")
        )
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"the UNet takes {config.in_channels} channels and gives {config.out_channels}; only text-to-image models, "
            "which take what they give, can be distilled"
        )
