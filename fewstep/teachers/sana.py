"""Sana: a transformer with linear attention on latents 32 times smaller [arXiv:2410.10629], on rectified flow."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PIXELS, PipelineEncoder, VAECodec, returning
from fewstep.teachers.flow import check_levels, few_steps, times
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.types import Condition

TOKENS = 300
"""Of Gemma's text, the pipeline's default: the first and the last, after the instruction."""
STEP = 32
"""Pixels of which its pipeline takes multiples only, whatever its VAE."""


class Sana(Backbone):
    """SanaTransformer2DModel.  Condition: "text" [B, 300, D], of Gemma; "mask" [B, 300], 1 where it counts."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    @property
    def time_embedding(self) -> str:
        """Before the layer that makes all blocks' shifts, scales and gates of it."""
        return "time_embed.emb.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (300, D), "mask": (300,)}, however many the tokenizer allows."""
        return {"text": (TOKENS, self.module.config.caption_channels), "mask": (TOKENS,)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000 times the network's own scale, the level after the scheduler's shift."""
        config: Any = self.module.config
        return t.float() * (1000.0 * config.timestep_scale)

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]."""
        return self.module(
            hidden_states=x,
            encoder_hidden_states=cond.tensors["text"].to(x.dtype),
            encoder_attention_mask=cond.tensors["mask"],
            timestep=network_time,
            return_dict=False,
        )[0]


class DCCodec(VAECodec):
    """AutoencoderDC: no distribution, one latent of each picture; nothing is shifted."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> latents [B, C', H', W'] float32."""
        parts = images.split(max(1, PIXELS // (images.shape[-2] * images.shape[-1])))
        with returning(self._vae):
            vae = self._vae.to(images.device)
            latents = torch.cat([vae.encode(part.to(vae.dtype), return_dict=False)[0] for part in parts])
        return latents.float() * vae.config.scaling_factor

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) in pixels of latents (C', H', W')."""
        scale = self._vae.spatial_compression_ratio
        return self._vae.config.in_channels, shape[1] * scale, shape[2] * scale


@FAMILIES.register("SanaPipeline")
def sana(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Sana.  resolution: pixels of a side, by default those of its config.

    A prompt stands behind the pipeline's instruction to the language model; what guidance leads away from does not.
    Sampled by Euler's method at its scheduler's own levels; DPM-Solver++, its usual one, is of second order and tells
    the network whole timesteps.
    Raises ValueError for schedulers without flow's levels.
    """
    check_levels(pipe.scheduler)
    config, scale = pipe.transformer.config, pipe.vae_scale_factor
    native = (config.in_channels, config.sample_size, config.sample_size)
    shape = resized(native, resolution, scale, max(config.patch_size, STEP // scale))
    # Its call makes 1024 pixels by default, or sizes of a list of its own.
    size = {"height": shape[1] * scale, "width": shape[2] * scale, "use_resolution_binning": False}

    def encode(prompt: str, instruction: Sequence[str] | None) -> dict[str, Tensor]:
        text, mask, _, _ = pipe.encode_prompt(
            prompt,
            False,
            device=pipe.text_encoder.device,
            max_sequence_length=TOKENS,
            complex_human_instruction=instruction,
        )
        return {"text": text, "mask": mask}

    def instructed(prompt: str) -> dict[str, Tensor]:
        call = inspect.signature(type(pipe).__call__).parameters
        return encode(prompt, call["complex_human_instruction"].default)

    return Teacher(
        denoiser=Denoiser(Sana(pipe.transformer), RectifiedFlow(), "flow"),
        encode=PipelineEncoder(instructed, negative=lambda prompt: encode(prompt, None)),
        codec=DCCodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=lambda steps: times(pipe.scheduler, None, steps),
        guidance=4.5,
        few_steps=few_steps(lambda _pipe: {"guidance_scale": 1.0, **size}, seeded=True),
        lpips=vgg_lpips,
    )
