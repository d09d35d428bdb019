"""Pictures as tokens of 2x2 patches and back, as the pipelines that carry tokens order them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle


def pack(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 W/2, 4 C]: patches row by row, in each channel after channel.  H and W are even."""
    return pixel_unshuffle(x, 2).flatten(2).mT


def unpack(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """The way back to [B, C, H, W].  size: (H, W)."""
    height, width = size
    return pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)
