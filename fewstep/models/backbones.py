"""Call adapters for diffusers networks: one small class a family, the networks themselves unmodified."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.models.denoiser import Backbone
from fewstep.types import Condition


class CogView4(Backbone):
    """CogView4Transformer2DModel.  Condition: "text" [B, L, D], the encoder's hidden states.

    vae_scale: pixels per latent; the network is told the image's size in pixels.
    """

    def __init__(self, module: nn.Module, vae_scale: int) -> None:
        super().__init__(module)
        self.vae_scale = vae_scale

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000, as CogView4Pipeline feeds it."""
        return t.float() * 1000.0

    def forward(self, x: Tensor, network_time: Tensor, cond: Condition) -> Tensor:
        """Raw flow prediction, [B, C, H, W]."""
        height, width = x.shape[-2] * self.vae_scale, x.shape[-1] * self.vae_scale
        size = torch.tensor([height, width], dtype=x.dtype, device=x.device).expand(len(x), 2)
        return self.module(
            hidden_states=x,
            encoder_hidden_states=cond.tensors["text"].to(x.dtype),
            timestep=network_time,
            original_size=size,
            target_size=size,
            crop_coords=torch.zeros_like(size),
            return_dict=False,
        )[0]
