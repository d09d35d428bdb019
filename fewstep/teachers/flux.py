"""Flux: a transformer over picture and text, told how strongly to follow the text, on rectified flow.

Its guidance is embedded: the network gives in one call what guidance gave its teacher in two.  Guidance as elsewhere,
away from the empty prompt, is the pipeline's true_cfg_scale, and off by default.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import RectifiedFlow
from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.patches import pack, unpack
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.flow import dynamic_mu, few_steps, times
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.types import Condition

TOKENS = 512
"""Of T5's text, the pipeline's default."""
SIDE = 128
"""Of its latents, by default: the pipeline's, as no config names it."""
GUIDANCE = 3.5
"""Embedded, the pipeline's default."""


class Flux(Backbone):
    """FluxTransformer2DModel.  Condition: "text" [B, L, D], of T5; "pooled" [B, P], of CLIP.

    guidance: told to a network that has it embedded, None to others.
    """

    def __init__(self, module: nn.Module, guidance: float | None = None) -> None:
        super().__init__(module)
        self.guidance = guidance

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks, of both kinds one after the other."""
        return late(blocks_of(self.module, "transformer_blocks", "single_transformer_blocks"))

    def feature(self, output: Any, x: Tensor) -> Tensor:
        """The picture's tokens: a block returns the text's first."""
        return output[1] if isinstance(output, tuple) else output

    @property
    def time_embedding(self) -> str:
        """That of the time alone; guidance and pooled text have others."""
        return "time_text_embed.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (L, D), "pooled": (P,)}; of CLIP's tokens it is given the whole prompt's only."""
        config: Any = self.module.config
        return {"text": (TOKENS, config.joint_attention_dim), "pooled": (config.pooled_projection_dim,)}

    def network_time(self, t: Tensor) -> Tensor:
        """0..1, the level after the scheduler's shift: the network itself multiplies it by 1000, in its own dtype."""
        return t.float()

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]; H and W are even."""
        text, pooled = (cond.tensors[name].to(x.dtype) for name in ("text", "pooled"))
        size = x.shape[-2:]
        rows, columns = (torch.arange(side // 2, device=x.device) for side in size)
        places = torch.cartesian_prod(rows.new_zeros(1), rows, columns)
        tokens = self.module(
            hidden_states=pack(x),
            timestep=network_time,
            guidance=None if self.guidance is None else torch.full_like(network_time, self.guidance),
            encoder_hidden_states=text,
            pooled_projections=pooled,
            txt_ids=places.new_zeros(text.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return unpack(tokens, size)


@FAMILIES.register("FluxPipeline")
def flux(pipe: Any, source: str, *, resolution: int | None = None, embedded_guidance: float | None = None) -> Teacher:
    """Flux.1.  resolution: pixels of a side, by default those of 128 latents.

    embedded_guidance: told to a network that has guidance embedded, by default 3.5.  Raises ValueError for others.
    """
    config = pipe.transformer.config
    if embedded_guidance is not None and not config.guidance_embeds:
        raise ValueError(f"{source!r} has no guidance embedded, so embedded_guidance has no effect; leave it out")
    guidance = (GUIDANCE if embedded_guidance is None else embedded_guidance) if config.guidance_embeds else None
    shape = resized((config.in_channels // 4, SIDE, SIDE), resolution, pipe.vae_scale_factor, 2)
    mu = dynamic_mu(pipe.scheduler, (shape[1] // 2) * (shape[2] // 2), most=1.15)

    def encode(prompt: str) -> dict[str, Tensor]:
        text, pooled, _ = pipe.encode_prompt(prompt, device=pipe.text_encoder.device, max_sequence_length=TOKENS)
        return {"text": text, "pooled": pooled}

    def grid(steps: int) -> Tensor:
        return times(pipe.scheduler, mu, steps, torch.linspace(1, 1 / steps, steps, dtype=torch.float64).tolist())

    return Teacher(
        denoiser=Denoiser(Flux(pipe.transformer, guidance), RectifiedFlow(), "flow"),
        encode=PipelineEncoder(encode),
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=grid,
        few_steps=few_steps(lambda _pipe: {} if guidance is None else {"guidance_scale": guidance}, packed=True),
        lpips=vgg_lpips,
    )
