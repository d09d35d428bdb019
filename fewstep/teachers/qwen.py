"""Qwen-Image: a transformer over picture and text [MMDiT, arXiv:2508.02324] on rectified flow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import RectifiedFlow
from fewstep.diffusion.prediction import extrapolated
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.patches import pack, unpack
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder
from fewstep.teachers.flow import dynamic_mu, few_steps, times
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.teachers.wan import FilmCodec
from fewstep.types import Condition

TOKENS = 512
"""Of Qwen2.5-VL's text at the most, the pipeline's default."""
SIDE = 128
"""Of its latents, by default: the pipeline's, as no config names it."""


class QwenImage(Backbone):
    """QwenImageTransformer2DModel.  Condition: "text" [B, L, D], of Qwen2.5-VL; "length" [B] if it varies."""

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """The picture's tokens: a block returns the text's first."""
        return output[1]

    @property
    def time_embedding(self) -> str:
        """It is the only one."""
        return "time_text_embed.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (512, D)}: the longest prompt's."""
        return {"text": (TOKENS, self.module.config.joint_attention_dim)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """0..1, the level after the scheduler's shift: the network itself multiplies it by 1000."""
        return t.float()

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]; H and W are even.

        "length" says how many of the L tokens are a row's own: the others are masked, and a row gets what it gets
        alone.
        """
        text, lengths = cond.tensors["text"].to(x.dtype), cond.tensors.get("length")
        mask = None if lengths is None else torch.arange(text.shape[1], device=x.device) < lengths[:, None]
        size = x.shape[-2:]
        tokens = self.module(
            hidden_states=pack(x),
            timestep=network_time,
            encoder_hidden_states=text,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, size[0] // 2, size[1] // 2)]] * len(x),
            return_dict=False,
        )[0]
        return unpack(tokens, size)

    def guide(self, c: Tensor, u: Tensor, scale: float) -> Tensor:
        """m = u + scale (c - u), then  m |c| / |m|,  lengths of each 2x2 patch over its channels, as its pipeline does.

        So it is guided everywhere, in its samples and as a score, as FastGen advises for its distillation.
        """
        guided = pack(extrapolated(c, u, scale))
        wanted, found = (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) for tokens in (pack(c), guided))
        return unpack(guided * (wanted / found.clamp_min(torch.finfo(found.dtype).tiny)), c.shape[-2:])


class StillCodec(FilmCodec):
    """AutoencoderKLQwenImage, a VAE of videos as Wan's: latents of a picture, [B, C, H, W].  It clamps by itself."""

    def __init__(self, vae: Any) -> None:
        super().__init__(vae, frames=1)

    def render(self, x: Tensor) -> Tensor:
        """`decode` with a gradient for x, all at once: [B, 3, H', W']."""
        return super().render(x[:, :, None])

    def encode(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] -> the mean latents [B, C, H', W'] float32."""
        return super().encode(images)[:, :, 0]

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(3, H, W) in pixels of latents (C, H', W')."""
        scale = self._vae.spatial_compression_ratio
        return 3, shape[1] * scale, shape[2] * scale


@FAMILIES.register("QwenImagePipeline")
def qwen_image(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Qwen-Image.  resolution: pixels of a side, by default those of 128 latents.

    Guidance leads away from the empty prompt; its makers' examples take one of a single space.
    """
    shape = resized((pipe.transformer.config.in_channels // 4, SIDE, SIDE), resolution, pipe.vae_scale_factor, 2)
    mu = dynamic_mu(pipe.scheduler, (shape[1] // 2) * (shape[2] // 2), most=1.15)

    def encode(prompt: str) -> dict[str, Tensor]:
        text, _ = pipe.encode_prompt(prompt, device=pipe.text_encoder.device, max_sequence_length=TOKENS)
        return {"text": text}

    def grid(steps: int) -> Tensor:
        return times(pipe.scheduler, mu, steps, torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())

    return Teacher(
        denoiser=Denoiser(QwenImage(pipe.transformer), RectifiedFlow(), "flow"),
        encode=PipelineEncoder(encode),
        codec=StillCodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=grid,
        guidance=4.0,
        few_steps=few_steps(lambda _pipe: {"true_cfg_scale": 1.0}, packed=True),
        lpips=vgg_lpips,
    )
