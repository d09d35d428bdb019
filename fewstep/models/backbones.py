"""Call adapters for diffusers networks: one small class a family, the networks themselves unmodified."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Backbone, blocks_of, late
from fewstep.types import Condition


class CogView4(Backbone):
    """CogView4Transformer2DModel.  Condition: "text" [B, L, D], the encoder's hidden states; "length" [B] if it varies.

    vae_scale: pixels per latent; the network is told the image's size in pixels.
    """

    def __init__(self, module: nn.Module, vae_scale: int) -> None:
        super().__init__(module)
        self.vae_scale = vae_scale

    @property
    def taps(self) -> tuple[str, ...]:
        """The `late` blocks."""
        return late(blocks_of(self.module, "transformer_blocks"))

    @property
    def time_embedding(self) -> str:
        """That of the time alone; sizes have another."""
        return "time_condition_embed.timestep_embedder"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (L, D)}"""
        return {"text": (tokens, self.module.config.text_embed_dim)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000, as CogView4Pipeline feeds it."""
        return t.float() * 1000.0

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W].

        "length" says how many of the L tokens are a row's own.  The network takes no mask, so there is one call for
        each length, and a row gets what it gets alone.
        """
        text, lengths = cond.tensors["text"].to(x.dtype), cond.tensors.get("length")
        if lengths is None:
            return self._call(x, network_time, text)
        known = lengths.unique().tolist()
        if len(known) == 1:
            return self._call(x, network_time, text[:, : known[0]])
        groups = [(lengths == n).nonzero()[:, 0] for n in known]
        parts = [self._call(x[rows], network_time[rows], text[rows, :n]) for n, rows in zip(known, groups, strict=True)]
        return torch.cat(parts)[torch.cat(groups).argsort()]

    def _call(self, x: Tensor, network_time: Tensor, text: Tensor) -> Tensor:
        height, width = x.shape[-2] * self.vae_scale, x.shape[-1] * self.vae_scale
        size = torch.tensor([height, width], dtype=x.dtype, device=x.device).expand(len(x), 2)
        return self.module(
            hidden_states=x,
            encoder_hidden_states=text,
            timestep=network_time,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]


class UNet2DCondition(Backbone):
    """UNet2DConditionModel (Stable Diffusion 1.x, 2.x).  Condition: "text" [B, L, D], the encoder's hidden states.

    last: the last index of the table of times that the network was trained on.
    """

    def __init__(self, module: nn.Module, last: int = 999) -> None:
        super().__init__(module)
        self.last = last

    @property
    def taps(self) -> tuple[str, ...]:
        """The bottleneck     [DMD2, arXiv:2405.14867, section 4.3]"""
        return ("mid_block",)

    @property
    def time_embedding(self) -> str:
        """Before the embeddings of classes and texts, where a network has those."""
        return "time_embedding"

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (L, D)}"""
        return {"text": (tokens, self.module.config.cross_attention_dim)}  # type: ignore[union-attr]

    def network_time(self, t: Tensor) -> Tensor:
        """0..last.  In float32, where every index i survives i / last * last; in float64 748 / 999 * 999 does not."""
        return t.float() * self.last

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw prediction, [B, C, H, W]."""
        text = cond.tensors["text"].to(x.dtype)
        return self.module(
            x, network_time, encoder_hidden_states=text, added_cond_kwargs=self.added(x, cond), return_dict=False
        )[0]

    def added(self, x: Tensor, cond: Condition) -> dict[str, Tensor] | None:
        """What the network is told besides time and text; nothing here."""
        return None


class UNet2DConditionXL(UNet2DCondition):
    """UNet2DConditionModel of Stable Diffusion XL.  Condition: "text" [B, L, D]; "pooled" [B, P], the whole prompt's.

    vae_scale: pixels per latent; the network is told the picture's size in pixels.
    """

    def __init__(self, module: nn.Module, last: int, vae_scale: int) -> None:
        super().__init__(module, last)
        self.vae_scale = vae_scale

    def conditions(self, tokens: int) -> dict[str, tuple[int, ...]]:
        """{"text": (L, D), "pooled": (P,)}"""
        config: Any = self.module.config
        # Its embedding takes the pooled text beside six numbers of sizes.
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return super().conditions(tokens) | {"pooled": (pooled,)}

    def added(self, x: Tensor, cond: Condition) -> dict[str, Tensor]:
        """The pooled text, and original size, crop and target size: those of an uncropped picture of x's size."""
        height, width = x.shape[-2] * self.vae_scale, x.shape[-1] * self.vae_scale
        ids = torch.tensor([height, width, 0, 0, height, width], dtype=x.dtype, device=x.device)
        return {"text_embeds": cond.tensors["pooled"].to(x.dtype), "time_ids": ids.expand(len(x), 6)}
