"""The Inception-v3 of FID: the network of 2015-12-05, whose pooling is not that of the paper's nor of torchvision's.

Its weights are not packaged; `metrics/weights.py` says where they may lie, under the names that torch-fidelity and
pytorch-fid published them by, or as a safetensors file of the same keys.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.metrics import weights

SIZE, FEATURE_DIM, NUM_LOGITS = 299, 2048, 1008
FILE = "weights-inception-2015-12-05-6726825d.pth"
FILES = (FILE, "pt_inception-2015-12-05-6726825d.pth", "inception-2015-12-05.safetensors")
KNOWN_SHA256 = ("6726825d",)
"""How the SHA-256 of verified files begins. By torch.hub's convention these eight digits end the published name; the
other 56 are not known here: this tells a damaged or another file, not one that was forged with much effort."""

STEM = "Conv2d_1a_3x3:32@3x3/2 Conv2d_2a_3x3:32@3x3 Conv2d_2b_3x3:64@3x3+1 Conv2d_3b_1x1:80@1x1 Conv2d_4a_3x3:192@3x3"


def _block_35(pool: int) -> dict[str, str]:
    return {
        "branch1x1": "64@1x1",
        "branch5x5": "48@1x1 64@5x5",
        "branch3x3dbl": "64@1x1 96@3x3 96@3x3",
        "branch_pool": f"{pool}@1x1",
    }


def _block_17(width: int) -> dict[str, str]:
    wide, tall = f"{width}@1x7", f"{width}@7x1"
    return {
        "branch1x1": "192@1x1",
        "branch7x7": f"{width}@1x1 {wide} 192@7x1",
        "branch7x7dbl": f"{width}@1x1 {tall} {wide} {tall} 192@1x7",
        "branch_pool": "192@1x1",
    }


BLOCK_8 = {
    "branch1x1": "320@1x1",
    "branch3x3": "384@1x1 384@1x3|384@3x1",
    "branch3x3dbl": "448@1x1 384@3x3 384@1x3|384@3x1",
    "branch_pool": "192@1x1",
}
BLOCKS: dict[str, tuple[str, dict[str, str]]] = {
    "Mixed_5b": ("mean", _block_35(32)),
    "Mixed_5c": ("mean", _block_35(64)),
    "Mixed_5d": ("mean", _block_35(64)),
    "Mixed_6a": ("halve", {"branch3x3": "384@3x3/2", "branch3x3dbl": "64@1x1 96@3x3 96@3x3/2"}),
    "Mixed_6b": ("mean", _block_17(128)),
    "Mixed_6c": ("mean", _block_17(160)),
    "Mixed_6d": ("mean", _block_17(160)),
    "Mixed_6e": ("mean", _block_17(192)),
    "Mixed_7a": ("halve", {"branch3x3": "192@1x1 320@3x3/2", "branch7x7x3": "192@1x1 192@1x7 192@7x1 192@3x3/2"}),
    "Mixed_7b": ("mean", BLOCK_8),
    "Mixed_7c": ("max", BLOCK_8),
}
"""Pooling and branches of each block [Inception-v3: arXiv:1512.00567].

A branch is a chain of convolutions "width@HxW", "/2" with stride 2 and else padded to keep the size; "a|b" are two
beside each other.  Pooling comes before branch_pool: the mean over the pixels that exist, where zero padding would
count, or in Mixed_7c the maximum; "halve" is a maximum of stride 2 with no convolution after it.  So the TensorFlow
graph of 2015-12-05 has it, and FID is a figure of that graph.
"""


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm with eps 1e-3, ReLU."""

    def __init__(
        self, width_in: int, width: int, kernel: tuple[int, int], stride: int, padding: tuple[int, int]
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side, concatenated over channels."""

    def __init__(self, width_in: int, pool: str, branches: dict[str, str]) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[list[str]]] = []
        self.width = width_in if pool == "halve" else 0
        for branch, chain in branches.items():
            steps, width, names = chain.split(), width_in, []
            for number, step in enumerate(steps, 1):
                layers = [_convolution(width, text) for text in step.split("|")]
                name = branch if len(steps) == 1 else f"{branch}_{number}"
                names.append([name + suffix for suffix in ("ab" if len(layers) > 1 else [""])])
                for own, layer in zip(names[-1], layers, strict=True):
                    self.add_module(own, layer)
                width = sum(layer.conv.out_channels for layer in layers)
            self.chains.append(names)
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.chains:
            hidden = self._pooled(x) if chain[0][0] == "branch_pool" else x
            for names in chain:
                hidden = torch.cat([self.get_submodule(name)(hidden) for name in names], 1)
            outputs.append(hidden)
        return torch.cat([*outputs, F.max_pool2d(x, 3, 2)] if self.pool == "halve" else outputs, 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Inception(nn.Module):
    """The network of FID and of the Inception score, under the parameter names of torch-fidelity's file."""

    def __init__(self) -> None:
        super().__init__()
        width = 3
        for entry in STEM.split():
            name, text = entry.split(":")
            layer = _convolution(width, text, same=False)
            self.add_module(name, layer)
            width = layer.conv.out_channels
        for name, (pool, branches) in BLOCKS.items():
            block = Block(width, pool, branches)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, NUM_LOGITS)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pooled features.  pixels: [N, 3, 299, 299], float32 in [0, 255].  Returns [N, 2048] float32."""
        hidden = (pixels - 128) / 128
        for name, layer in self.named_children():
            if name == "fc":
                break
            hidden = layer(hidden)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                hidden = F.max_pool2d(hidden, 3, 2)
        return hidden.mean((2, 3))


def tf1_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """Bilinear resize of TensorFlow 1, which reads output pixel i at i H / size: corners not aligned, no half pixel.

    images: [N, C, H, W], uint8 or float.  Returns [N, C, size, size] float32.
    """
    return _tf1_along(_tf1_along(images.to(torch.float32), 3, size), 2, size)


def clean_resize(images: Tensor, size: int = SIZE) -> Tensor:
    """PIL's bicubic resize of every channel in floating point, clipped but not rounded, as of arXiv:2104.11222.

    images: [N, C, H, W] uint8, on the CPU.  Returns [N, C, size, size] float32 in [0, 255].
    """
    import numpy
    from PIL import Image

    def resized(channel: Tensor) -> Tensor:
        made = Image.fromarray(channel.float().numpy()).resize((size, size), Image.Resampling.BICUBIC)
        return torch.from_numpy(numpy.array(made)).clamp(0, 255)

    return torch.stack([torch.stack([resized(channel) for channel in image]) for image in images])


def load_inception(
    path: Path | None = None, *, sha256: str | None = None, allow_unverified: bool = False
) -> tuple[Inception, str, bool]:
    """The network in eval mode without gradients, the SHA-256 of its file, and whether that is the published one.

    path: by default the first of `FILES` that is found.  sha256: takes the place of the known one.  A pickle is read as
    tensors alone.  Raises FileNotFoundError if there is none, ValueError for a file of another hash unless allowed, and
    for one that does not hold these tensors.
    """
    path = path or weights.find(FILES, "FID's Inception")
    known = KNOWN_SHA256 if sha256 is None else (sha256,)
    digest, verified = weights.verify(path, known, allow_unverified=allow_unverified)
    model = Inception()
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(tensors)
    except Exception as error:  # what a pickle, a zip and a missing key raise has no common class
        raise ValueError(f"{path} does not hold Inception's 566 tensors: {str(error).splitlines()[0]}") from error
    return model.eval().requires_grad_(False), digest, verified


def inception_score(features: Tensor, head: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation (divisor splits) over parts of the samples in their order.

    IS = exp E_x KL(p(y | x) || E_x p(y | x)),  p = softmax(head features)        [arXiv:1606.03498; bias left out]

    features: [N, D], head: [K, D] = fc.weight; both taken to float64.  N >= splits >= 1.  Depends on the order through
    the parts alone.
    """
    if not 1 <= splits <= len(features):
        raise ValueError(f"splits must be in 1..{len(features)}, the number of samples, got {splits}.")
    log_p = (features.double() @ head.double().T).log_softmax(1)
    values = []
    for part in log_p.tensor_split(splits):
        log_mean = part.logsumexp(0) - torch.tensor(float(len(part)), dtype=torch.float64).log()
        values.append((part.exp() * (part - log_mean)).sum(1).mean().exp())
    scores = torch.stack(values)
    return float(scores.mean()), float(scores.std(correction=0))


def _convolution(width_in: int, text: str, *, same: bool = True) -> ConvNorm:
    """Of "width@HxW", "width@HxW/stride" or, where sizes are not kept, "width@HxW+padding"."""
    text, _, added = text.partition("+")
    text, _, stride = text.partition("/")
    width, _, kernel = text.partition("@")
    height, _, across = kernel.partition("x")
    size = int(height), int(across)
    padding = (size[0] // 2, size[1] // 2) if same and not stride else (int(added or 0), int(added or 0))
    return ConvNorm(width_in, int(width), size, int(stride or 1), padding)


def _tf1_along(x: Tensor, dim: int, size: int) -> Tensor:
    """One direction of `tf1_resize`; positions in float32, as TensorFlow has them."""
    length = x.shape[dim]
    at = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(length / size, dtype=torch.float32)
    low = at.long().clamp_max(length - 1)
    high = (low + 1).clamp_max(length - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    first = x.index_select(dim, low)
    return first + (x.index_select(dim, high) - first) * (at - low).reshape(shape)
