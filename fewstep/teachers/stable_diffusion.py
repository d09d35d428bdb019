"""Pipelines whose network is a UNet on a table of noise levels: Stable Diffusion 1.x, 2.x and XL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from fewstep.models.backbones import UNet2DCondition, UNet2DConditionXL
from fewstep.models.denoiser import Denoiser
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.teachers.table import ddim_grid, few_steps, kind_of, table_of


@FAMILIES.register("StableDiffusionPipeline")
def stable_diffusion(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Stable Diffusion 1.x and 2.x: a UNet and one text encoder.

    resolution: pixels of a side, by default those of its config.
    """
    _check_unet(pipe.unet)

    def encode(prompt: str) -> dict[str, Tensor]:
        return {"text": pipe.encode_prompt(prompt, pipe.text_encoder.device, 1, False)[0]}

    return _teacher(pipe, source, UNet2DCondition, PipelineEncoder(encode), resolution, guidance=7.5)


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
    return _teacher(pipe, source, backbone, encoder, resolution, guidance=5.0)


def _teacher(
    pipe: Any,
    source: str,
    backbone: Callable[..., UNet2DCondition],
    encode: PipelineEncoder,
    resolution: int | None,
    *,
    guidance: float,
) -> Teacher:
    """A teacher on its scheduler's own betas; see `table`."""
    kind, schedule = kind_of(pipe.scheduler), table_of(pipe.scheduler)
    size, last = pipe.unet.config.sample_size, len(schedule.alphas_cumprod) - 1
    sides = (size, size) if isinstance(size, int) else tuple(size)
    halvings = len(pipe.unet.config.block_out_channels) - 1
    shape = resized((pipe.unet.config.in_channels, *sides), resolution, pipe.vae_scale_factor, 2**halvings)
    return Teacher(
        denoiser=Denoiser(backbone(pipe.unet, last), schedule, kind),
        encode=encode,
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=ddim_grid(pipe.scheduler),
        solver="ddim",
        guidance=guidance,
        few_steps=few_steps("unet"),
        lpips=vgg_lpips,
    )


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
