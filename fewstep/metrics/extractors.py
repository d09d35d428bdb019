"""What turns pictures into features: Inception, DINOv2, CLIP and the packaged classifier, each behind one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics import weights as files
from fewstep.metrics.features import FASHION_CLASSIFIER, FEATURE_DIM, dequantise, file_sha256, load_fashion_classifier
from fewstep.metrics.inception import Inception, clean_resize, load_inception, tf1_resize

RESIZES = ("tf1-bilinear", "clean-bicubic")
FOLDERS = {"dinov2": "dinov2-large", "clip": "clip-vit-large-patch14-336"}
"""Transformers folders with safetensors, called as their publishers do."""
NAMES = ("inception", *FOLDERS, "fashion")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP_PIXELS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Means and deviations of red, green and blue in [0, 1] by which a network's pixels are normalised."""


@dataclass(frozen=True)
class Extractor:
    """A frozen network that is called with bytes.

    dim: length of its features.  channels: of the pictures.  resize: how they reach its size.  sha256: of its weights'
    file.  verified: whether that is the hash of the published weights.  head: [K, dim] where softmax(head f) are the
    probabilities of classes.
    """

    name: str
    dim: int
    channels: int
    resize: str
    sha256: str
    verified: bool
    embed: Callable[[Tensor], Tensor]
    head: Tensor | None = None

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Features of pictures: [N, dim] float32, on the CPU.

        images: [N, channels, H, W] uint8; another shape or type raises ValueError.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images must be [N, {self.channels}, H, W] uint8, got {tuple(images.shape)} {images.dtype}; "
                "metrics.features.quantise makes bytes of [-1, 1]."
            )
        return self.embed(images).float().cpu()

    @property
    def protocol(self) -> dict[str, Any]:
        """What fixes its features besides the pictures."""
        return {"name": self.name, "dim": self.dim, "resize": self.resize, "sha256": self.sha256}


def load_extractor(
    name: str,
    *,
    resize: str = "",
    weights: Path | None = None,
    sha256: str | None = None,
    allow_unverified: bool = False,
    device: torch.device | str = "cpu",
) -> Extractor:
    """The extractor of this name.

    inception: 2048 features, the resize of TensorFlow 1 or clean-fid's.  dinov2: the class token of DINOv2 ViT-L/14
    [FD-DINOv2: arXiv:2306.04675].  clip: unit image embeddings of CLIP ViT-L/14-336 [CMMD: arXiv:2401.09603].  fashion:
    the packaged classifier's 128 features of grey 32x32 pictures.

    resize: inception's, one of `RESIZES`.  weights: inception's file or a transformers folder; by default they are
    found.  sha256: of the weights' file, as its publisher gives it; that makes it verified.
    Raises LookupError for an unknown name, FileNotFoundError for missing weights, and ValueError for those of another
    hash than the known one, or of which none is known, unless allowed.
    """
    if name not in NAMES:
        raise LookupError(f"no extractor named {name!r}; known: {', '.join(NAMES)}")
    if resize not in ("", *RESIZES):
        raise LookupError(f"no resize named {resize!r}; known: {', '.join(RESIZES)}")
    if name == "fashion":
        return _fashion(device)
    if name == "inception":
        loaded = load_inception(weights, sha256=sha256, allow_unverified=allow_unverified)
        return _inception(*loaded, resize or RESIZES[0], device)
    folder = weights or files.find([FOLDERS[name]], name)
    known = [] if sha256 is None else [sha256]
    digest, verified = files.verify(folder / "model.safetensors", known, allow_unverified=allow_unverified)
    return (_dinov2 if name == "dinov2" else _clip)(folder, digest, verified, device)


def _inception(model: Inception, digest: str, verified: bool, resize: str, device: torch.device | str) -> Extractor:
    model.to(device)

    def embed(images: Tensor) -> Tensor:
        return model(tf1_resize(images.to(device)) if resize == "tf1-bilinear" else clean_resize(images).to(device))

    head = model.fc.weight.cpu()
    return Extractor("inception", head.shape[1], 3, resize, digest, verified, embed, head)


def _fashion(device: torch.device | str) -> Extractor:
    model = load_fashion_classifier().to(device)
    digest = file_sha256(FASHION_CLASSIFIER / "model.safetensors")

    def embed(images: Tensor) -> Tensor:
        if images.shape[2:] != (32, 32):
            raise ValueError(f"the classifier's pictures are 32x32, got {images.shape[2]}x{images.shape[3]}.")
        return model(dequantise(images).to(device))[0]

    return Extractor("fashion", FEATURE_DIM, 1, "none", digest, True, embed)


def _dinov2(folder: Path, digest: str, verified: bool, device: torch.device | str) -> Extractor:
    """Pictures reach 224 by clean-fid's resize, as in the code of FD-DINOv2's authors."""
    from transformers import Dinov2Model

    model: Any = Dinov2Model.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    model.to(device)

    def embed(images: Tensor) -> Tensor:
        pixels = _normalised(clean_resize(images, 224).to(device) / 255, *IMAGENET)
        return model(pixel_values=pixels).pooler_output

    return Extractor("dinov2", model.config.hidden_size, 3, "clean-bicubic to 224", digest, verified, embed)


def _clip(folder: Path, digest: str, verified: bool, device: torch.device | str) -> Extractor:
    """Pictures reach the tower's size by torch's bicubic interpolation, not antialiased, as CMMD's are published."""
    from transformers import CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True
    ).eval()
    model.to(device)
    size = model.config.image_size

    def embed(images: Tensor) -> Tensor:
        pixels = F.interpolate(images.to(device).float() / 255, (size, size), mode="bicubic", align_corners=False)
        seen = model(pixel_values=_normalised(pixels, *CLIP_PIXELS)).image_embeds
        return F.normalize(seen.float(), dim=1)

    resize = f"torch bicubic to {size}"
    return Extractor("clip", model.config.projection_dim, 3, resize, digest, verified, embed)


def _normalised(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    centre, scale = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (mean, std))
    return (pixels - centre) / scale
