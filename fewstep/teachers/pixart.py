"""PixArt-Sigma: a transformer with cross-attention to T5's text [arXiv:2403.04692], on a table of noise levels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fewstep.models.denoiser import Backbone, Denoiser, blocks_of, late
from fewstep.models.perception import vgg_lpips
from fewstep.teachers.base import Teacher, TeacherCard
from fewstep.teachers.codecs import PipelineEncoder, VAECodec
from fewstep.teachers.pipelines import FAMILIES, resized
from fewstep.teachers.table import ddim_grid, few_steps, kind_of, table_of
from fewstep.types import Condition

TOKENS = 300
"""Of T5's text, the pipeline's default, to which it pads every prompt."""


class PixArt(Backbone):
    """PixArtTransformer2DModel.  Condition: "text" [B, 300, D], of T5; "mask" [B, 300], 1 where it counts.

    last: the last index of the table of times that the network was trained on.
    """

    def __init__(self, module: nn.Module, last: int = 999) -> None:
        super().__init__(module)
        self.last = last

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    @property
    def time_embedding(self) -> str:
        """Before the layer that makes all blocks' shifts, scales and gates of it."""
        return "adaln_single.emb.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (300, D), "mask": (300,)}, however many the tokenizer allows."""
        return {"text": (TOKENS, self.module.config.caption_channels), "mask": (TOKENS,)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """0..last, in float32."""
        return t.float() * self.last

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw prediction, [B, C, H, W]: of a network that also learned its variance, 2 C channels, the mean's half."""
        output = self.module(
            x,
            encoder_hidden_states=cond.tensors["text"].to(x.dtype),
            encoder_attention_mask=cond.tensors["mask"],
            timestep=network_time,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : x.shape[1]]


@FAMILIES.register("PixArtSigmaPipeline")
def pixart_sigma(pipe: Any, source: str, *, resolution: int | None = None) -> Teacher:
    """PixArt-Sigma.  Prompts are taken as they are, but for capitals: not cleaned, as its pipeline does if it can.

    resolution: pixels of a side, by default those of its config.
    Raises ValueError for a network that is told sizes, which its pipeline does not tell.
    """
    config = pipe.transformer.config
    if pipe.transformer.use_additional_conditions:
        raise ValueError(
            f"{source!r} has a network that is told resolution and aspect ratio (use_additional_conditions), and its "
            "pipeline tells neither; take a PixArt-Sigma, whose config sets it to false"
        )
    kind, schedule = kind_of(pipe.scheduler), table_of(pipe.scheduler)
    native = (config.in_channels, config.sample_size, config.sample_size)

    def encode(prompt: str) -> dict[str, Tensor]:
        text, mask, _, _ = pipe.encode_prompt(
            prompt, False, device=pipe.text_encoder.device, clean_caption=False, max_sequence_length=TOKENS
        )
        return {"text": text, "mask": mask}

    return Teacher(
        denoiser=Denoiser(PixArt(pipe.transformer, len(schedule.alphas_cumprod) - 1), schedule, kind),
        encode=PipelineEncoder(encode),
        codec=VAECodec(pipe.vae),
        shape=resized(native, resolution, pipe.vae_scale_factor, config.patch_size),
        card=TeacherCard(source, source),
        prompts=(),
        grid=ddim_grid(pipe.scheduler),
        solver="ddim",
        guidance=4.5,
        # No bins: they would make every size one of its own list, and cleaning depends on what is installed.
        few_steps=few_steps("transformer", use_resolution_binning=False, clean_caption=False),
        lpips=vgg_lpips,
    )
