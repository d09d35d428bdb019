"""How much a generator's pictures of one prompt differ: mean pairwise LPIPS."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy
import torch
from torch import Tensor

from fewstep.metrics.features import dequantise, quantise
from fewstep.models.perception import Distance

SIZE = 512
"""Pixels of the shorter edge that larger pictures are brought to."""


@torch.no_grad()
def diversities(groups: Iterable[Tensor], distance: Distance, device: torch.device | str = "cpu") -> Iterator[float]:
    """Of each prompt's pictures, a prompt at a time; the figure is their mean.

    sum_(i<j) d(x_i, x_j) / (K (K - 1) / 2)          [DMD2's code, arXiv:2405.14867; d is LPIPS, arXiv:1801.03924]

    groups: K pictures of one prompt each, [K, C, H, W] in [-1, 1] or uint8; they are made bytes first, and larger ones
    than 512 are brought to that by Lanczos.  Raises ValueError for fewer than two.
    """
    for pictures in groups:
        check_per_prompt(len(pictures))
        shown = _shown(pictures).to(device)
        # A picture beside all later ones: every pair once, and no more than K - 1 in memory.
        parts = [distance(x.expand_as(shown[i:]), shown[i:]) for i, x in enumerate(shown[:-1, None], 1)]
        yield float(torch.cat(parts).double().mean())


def check_per_prompt(k: int) -> None:
    """Raises ValueError unless there are pairs."""
    if k < 2:
        raise ValueError(f"diversity compares pictures of one prompt: at least 2 of each are needed, got {k}")


def _shown(pictures: Tensor) -> Tensor:
    """Bytes as LPIPS takes them, float32 in [-1, 1]."""
    from PIL import Image

    pixels = quantise(pictures).cpu()
    height, width = pixels.shape[2:]
    short = min(height, width)
    if short > SIZE:
        size = round(width * SIZE / short), round(height * SIZE / short)
        planes = [Image.fromarray(plane.numpy()) for plane in pixels.flatten(0, 1)]
        smaller = [numpy.array(plane.resize(size, Image.Resampling.LANCZOS)) for plane in planes]
        pixels = torch.from_numpy(numpy.stack(smaller)).unflatten(0, pictures.shape[:2])
    return dequantise(pixels)
