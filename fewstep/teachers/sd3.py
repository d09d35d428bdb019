"""Stable Diffusion 3 and 3.5: a transformer over picture and text [MMDiT, arXiv:2403.03206] on rectified flow."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.flow import dynamic_mu, few_steps, times
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.types import Condition

TOKENS = 256
"""Of T5's text, the pipeline's default; before them stand CLIP's."""


class SD3(Backbone):
    """SD3Transformer2DModel.  Condition: "text" [B, L, D], of CLIP's and T5's encoders; "pooled" [B, P], CLIP's."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """The picture's tokens: a block returns the text's first."""
        return output[1] if isinstance(output, tuple) else output

    @property
    def time_embedding(self) -> str:
        """That of the time alone; the pooled text has another."""
        return "time_text_embed.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (L, D), "pooled": (P,)}"""
        config: Any = self.module.config
        return {"text": (tokens + TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000, the level after the scheduler's shift."""
        return t.float() * 1000.0

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]."""
        text, pooled = (cond.tensors[name].to(x.dtype) for name in ("text", "pooled"))
        return self.module(
            hidden_states=x,
            timestep=network_time,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            return_dict=False,
        )[0]


@FAMILIES.register("StableDiffusion3Pipeline")
def sd3(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Stable Diffusion 3 and 3.5.  resolution: pixels of a side, by default those of its config."""
    config = pipe.transformer.config
    native = (config.in_channels, config.sample_size, config.sample_size)
    shape = resized(native, resolution, pipe.vae_scale_factor, config.patch_size)
    mu = dynamic_mu(pipe.scheduler, (shape[1] // config.patch_size) * (shape[2] // config.patch_size))

    def encode(prompt: str) -> dict[str, Tensor]:
        text, _, pooled, _ = pipe.encode_prompt(
            prompt, None, None, device=pipe.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    return Teacher(
        denoiser=Denoiser(SD3(pipe.transformer), RectifiedFlow(), "flow"),
        encode=PipelineEncoder(encode),
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=lambda steps: times(pipe.scheduler, mu, steps),
        guidance=7.0,
        few_steps=few_steps(),
        lpips=vgg_lpips,
    )
