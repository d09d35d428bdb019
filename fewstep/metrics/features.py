"""The shipped Fashion-MNIST classifier: features for the Frechet distance "FMD" and the agreement with the prompt.

FMD is the Frechet distance on this network's 128 features. It is not an FID (another network, another scale) and must
not be called one. The network measures only: no generator, discriminator or VAE may be trained with it.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.metrics.frechet import Moments

FEATURE_DIM = 128
NUM_CLASSES = 10
FASHION_CLASSIFIER = Path(__file__).parents[1] / "teachers" / "weights" / "fashion-classifier"


class FashionClassifier(nn.Module):
    """A 94,586-parameter convolutional classifier of 32x32 grey pictures.

    Four 3x3 convolutions of widths 16-32-64-64 (the first with stride 2, the others followed by 2x2 max pooling), each
    with batch norm and ReLU; a linear layer to 128 numbers, which *before* its ReLU are the features; then the logits.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 16, 32, 64, 64)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride=2 if i == 1 else 1, padding=1, bias=False) for i, o in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.features = nn.Linear(widths[-1] * 4, FEATURE_DIM)
        self.logits = nn.Linear(FEATURE_DIM, NUM_CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images: [B, 1, 32, 32] float in [-1, 1], zero padded (-1).  Returns features [B, 128] and logits [B, 10]."""
        hidden = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            hidden = F.relu(norm(conv(hidden)))
            if index:
                hidden = F.max_pool2d(hidden, 2)
        features = self.features(hidden.flatten(1))
        return features, self.logits(F.relu(features))


def quantise(images: Tensor) -> Tensor:
    """The bytes that a picture file would hold: (127.5 x + 128) clipped to [0, 255], fraction dropped (EDM's rule).

    images: any shape, float in [-1, 1], or uint8, which is returned as it is.  Returns uint8.
    """
    if images.dtype == torch.uint8:
        return images
    return (images.float() * 127.5 + 128).clip(0, 255).to(torch.uint8)


def dequantise(images: Tensor) -> Tensor:
    """Bytes to float32 in [-1, 1], x / 127.5 - 1; `quantise` of the result gives the same bytes back."""
    return images.to(torch.float32) / 127.5 - 1


def load_fashion_classifier(folder: Path = FASHION_CLASSIFIER) -> FashionClassifier:
    """The packaged classifier in eval mode: stored as fp16 safetensors, loaded to fp32, without gradients."""
    path = folder / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(
            f"no classifier weights at {path}; build them: python -m fewstep.teachers.fashion_build --stage classifier"
        )
    model = FashionClassifier()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def load_reference(folder: Path = FASHION_CLASSIFIER) -> Moments:
    """Moments of the features of the 60,000 training images, as stored beside the classifier (float64)."""
    stored = load_file(folder / "reference.safetensors")
    count = int(stored["n"])
    return Moments(count, stored["mu"], stored["sigma"] * (count - 1))


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:  # a block at a time: some have gigabytes
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def extract(model: FashionClassifier, images: Tensor, *, batch_size: int = 500) -> tuple[Tensor, Tensor]:
    """Features and logits of pictures in one pass, always after `quantise`.

    images: [N, 1, 32, 32], float in [-1, 1] or uint8, on the CPU.  Returns [N, 128] and [N, 10] float32.
    """
    if images.ndim != 4 or images.shape[1:] != (1, 32, 32):
        raise ValueError(f"images must be [N, 1, 32, 32], got {tuple(images.shape)}.")
    if len(images) == 0:
        return torch.zeros(0, FEATURE_DIM), torch.zeros(0, NUM_CLASSES)
    pairs = [model(dequantise(quantise(part))) for part in images.split(batch_size)]
    return torch.cat([features for features, _ in pairs]), torch.cat([logits for _, logits in pairs])
