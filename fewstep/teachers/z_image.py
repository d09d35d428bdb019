"""Z-Image: a transformer over the tokens of picture and text in one row [arXiv:2511.22699] on rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.flow import dynamic_mu, few_steps, times
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.types import Condition

TOKENS = 512
"""Of Qwen3's text at the most, the pipeline's default; the network is given a prompt's own alone."""
SIDE = 128
"""Of its latents, by default: the pipeline's, as no config names it."""
PATCH = 2


class ZImage(Backbone):
    """ZImageTransformer2DModel.  Condition: "text" [B, L, D], of Qwen3; "length" [B] if it varies.

    Its time runs the other way, 0 = noise, and its output is x0 - eps.
    """

    one_call = True

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "layers"))

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """The picture's tokens, which stand first; padding and the text's follow."""
        return output[:, : (x.shape[-2] // PATCH) * (x.shape[-1] // PATCH)]

    @property
    def time_embedding(self) -> str:
        """There is no other."""
        return "t_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (512, D)}, the longest prompt's."""
        return {"text": (TOKENS, self.module.config.cap_feat_dim)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """1 - t, of the level after the scheduler's shift: the network itself multiplies it by 1000."""
        return 1 - t.float()

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]; H and W are even.  The network takes lists, and masks what they lack."""
        text, lengths = cond.tensors["text"].to(x.dtype), cond.tensors.get("length")
        own = [text.shape[1]] * len(x) if lengths is None else lengths.tolist()
        texts = [row[:length] for row, length in zip(text, own, strict=True)]
        made = self.module(list(x[:, :, None]), network_time, texts, patch_size=PATCH, return_dict=False)[0]
        return -torch.stack(made)[:, :, 0]


@FAMILIES.register("ZImagePipeline")
def z_image(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """Z-Image.  resolution: pixels of a side, by default those of 128 latents.

    Its pipeline's guidance_scale is what is added to the prompt's own prediction: one less than guidance here.
    """
    shape = resized((pipe.transformer.config.in_channels, SIDE, SIDE), resolution, pipe.vae_scale_factor, PATCH)
    mu = dynamic_mu(pipe.scheduler, (shape[1] // PATCH) * (shape[2] // PATCH), most=1.15)

    def encode(prompt: str) -> dict[str, Tensor]:
        texts, _ = pipe.encode_prompt(
            prompt, pipe.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=TOKENS
        )
        return {"text": texts[0][None]}

    def grid(steps: int) -> Tensor:
        return times(pipe.scheduler, mu, steps, torch.linspace(1, 1 / steps, steps).tolist())

    return Teacher(
        denoiser=Denoiser(ZImage(pipe.transformer), RectifiedFlow(), "flow"),
        encode=PipelineEncoder(encode),
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=grid,
        guidance=6.0,
        few_steps=few_steps(lambda _pipe: {"guidance_scale": 0.0}),
        lpips=vgg_lpips,
    )
