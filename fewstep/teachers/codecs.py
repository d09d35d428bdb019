"""Between a pipeline and what people give and get: prompts to conditions, latents to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from fewstep.types import Condition

KNOWN = 2**28
"""Bytes of embeddings that an encoder remembers."""


class PipelineEncoder:
    """Prompts to text embeddings, one prompt at a time, remembered as long as they are few.

    encode: a prompt -> its embedding as the pipeline makes it, [1, L, D].  One at a time because CogView4Pipeline pads
    to the longest prompt of the call: in a batch, a prompt's embedding would depend on its neighbours.
    """

    def __init__(self, encode: Callable[[str], Tensor]) -> None:
        self._encode = encode
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def _row(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            made = self._encode(prompt).detach()
            if len(self._known) * made.nbytes > KNOWN:
                self._known.clear()
            self._known[prompt] = made
        return self._known[prompt]

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> {"text": [B, L, D]}, and {"length": [B] int64} if they, or the empty prompt, differ in theirs.

        Shorter rows are padded with zeros to the longest; the network must be given `length` tokens of them only.
        """
        rows, null = [self._row(p) for p in prompts], self._row("")
        longest = max(row.shape[1] for row in [*rows, null])

        def stack(rows: list[Tensor]) -> dict[str, Tensor]:
            text = torch.cat([pad(row, (0, 0, 0, longest - row.shape[1])) for row in rows])
            return {"text": text, "length": torch.tensor([row.shape[1] for row in rows])}

        tensors, empty = stack(rows), stack([null])
        if all(row.shape[1] == longest for row in [*rows, null]):
            del tensors["length"], empty["length"]  # telling lengths apart costs the network call a synchronisation
        return Condition(tensors, empty)


PIXELS = 2**18
"""Pixels decoded at a time: one picture of 512x512, 256 of 32x32."""


class VAECodec:
    """AutoencoderKL latents to images as the pipeline decodes them: divided by the scaling factor."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae.requires_grad_(False)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 1 or 3, H', W'] in [-1, 1]."""
        _, height, width = self.image_shape(tuple(x.shape[1:]))
        # One float32 map of 256 channels is a kilobyte per pixel: some pictures at a time.
        parts = x.split(max(1, PIXELS // (height * width)))
        return torch.cat([self.render(part).clamp(-1, 1) for part in parts])

    def render(self, x: Tensor) -> Tensor:
        """`decode` with a gradient for x, all at once, and not clamped: where it clamps, the gradient would end."""
        vae = self._vae.to(x.device)
        return vae.decode(x.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    def features(self, images: Tensor) -> list[Tensor]:
        """What each stage of the encoder makes of images [B, C, H, W], with gradient: maps [B, C', H', W']."""
        vae = self._vae.to(images.device)
        maps = [vae.encoder.conv_in(images.to(vae.dtype))]
        for block in vae.encoder.down_blocks:
            maps.append(block(maps[-1]))
        return maps[1:]

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] -> the mean latents [B, C', H', W'] float32."""
        vae = self._vae.to(images.device)
        return vae.encode(images.to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """(C, H, W) in pixels of latents (C', H', W')."""
        scale = 2 ** (len(self._vae.config.block_out_channels) - 1)
        return self._vae.config.in_channels, shape[1] * scale, shape[2] * scale
