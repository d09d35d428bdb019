"""Frozen networks that look at the pictures which samples decode to, for losses that no score gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Distance = Callable[[Tensor, Tensor], Tensor]
"""Pictures and as many others, [B, 1 or 3, H, W] about in [-1, 1] -> how far apart each two are, [B] >= 0."""

Agreement = Callable[[Tensor, Sequence[str]], Tensor]
"""Pictures, as for `Distance`, and their B prompts -> cosines [B] of CLIP's embeddings of both."""

LPIPS_PACKAGES = ("torchmetrics", "torchvision")
LPIPS_SIZE = 224


@dataclass(frozen=True)
class Perception:
    """What a method's `needs` ask for, of these: LPIPS's `distance` ("lpips"), CLIP's `agreement` ("clip"), and the
    sample [1, *shape] that shows `black` ("black").

    render: samples [B, *shape], where diffusion runs, -> the pictures that they show, with gradient.
    """

    render: Callable[[Tensor], Tensor]
    distance: Distance | None = None
    agreement: Agreement | None = None
    black: Tensor | None = None

    def apart(self, x: Tensor, y: Tensor) -> Tensor:
        """How different samples and as many others look: [B], with gradient for x alone."""
        if self.distance is None:
            raise ValueError("there is no perceptual distance here; the objective's `needs` must contain 'lpips'")
        with torch.no_grad():
            target = self.render(y)
        return self.distance(self.render(x), target)

    def fits(self, x: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well samples show their prompts: cosines [B], with gradient."""
        if self.agreement is None:
            raise ValueError("there is no CLIP here; the objective's `needs` must contain 'clip'")
        return self.agreement(self.render(x), prompts)


def lpips_of(maps_x: Sequence[Tensor], maps_y: Sequence[Tensor]) -> Tensor:
    """LPIPS' distance of feature maps, every channel weighing the same.     [LPIPS, arXiv:1801.03924, eq. 1 with w = 1]

    sum over layers of mean over places of |x / |x| - y / |y||^2, norms over channels.  maps: [B, C, H, W] each, of
    channels and sizes that may differ from layer to layer.  Returns [B].
    """
    parts = [
        (F.normalize(x, dim=1, eps=1e-4) - F.normalize(y, dim=1, eps=1e-4)).square().sum(1).flatten(1).mean(1)
        for x, y in zip(maps_x, maps_y, strict=True)
    ]
    return torch.stack(parts).sum(0)


def feature_distance(features: Callable[[Tensor], list[Tensor]]) -> Distance:
    """`lpips_of` what `features` finds in pictures."""
    return lambda x, y: lpips_of(features(x), features(y))


@dataclass(frozen=True)
class VggLpips:
    """LPIPS' network `net` as a `Distance`.  version: torchmetrics'.

    Grey pictures are shown as three equal channels, smaller ones than 224 enlarged to it     [DMD, appendix B]
    """

    net: nn.Module
    version: str

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return self.net.to(x.device)(_for_vgg(x), _for_vgg(y)).flatten()


def vgg_lpips() -> VggLpips:
    """LPIPS with VGG16 and its learned weights, by torchmetrics; torchvision downloads VGG's where its cache has none.

    Raises ModuleNotFoundError if a package is missing.
    """
    check_lpips()
    from torchmetrics import __version__  # type: ignore[import-not-found]
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity  # type: ignore[import-not-found]

    # Its network alone: the metric around it adds up figures and refuses pictures a little outside [-1, 1].
    net = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net.requires_grad_(False)
    return VggLpips(net, __version__)


def check_lpips() -> None:
    """Raises ModuleNotFoundError if `vgg_lpips` lacks a package."""
    if missing := [name for name in LPIPS_PACKAGES if find_spec(name) is None]:
        raise ModuleNotFoundError(f"LPIPS needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _for_vgg(images: Tensor) -> Tensor:
    images = images.float().expand(-1, 3, -1, -1)
    if min(images.shape[2:]) >= LPIPS_SIZE:
        return images
    return F.interpolate(images, (LPIPS_SIZE, LPIPS_SIZE), mode="bilinear", align_corners=False)
