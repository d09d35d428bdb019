"""Fashion-MNIST from its four idx files, zero padded to 32x32."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_IMAGES_MAGIC, _LABELS_MAGIC = 2051, 2049


class Pictures(NamedTuple):
    """images: [N, 1, 32, 32] uint8, 0 = black border.  labels: [N] int64 in 0..9."""

    images: Tensor
    labels: Tensor


def read_idx(path: Path) -> Tensor:
    """One idx file of unsigned bytes, gzipped or not: [N] for labels, [N, H, W] for images, uint8.

    The format (yann.lecun.com/exdb/mnist): big endian magic 0x0800 + number of dimensions, the dimensions, the bytes.
    """
    raw = path.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    magic = struct.unpack(">I", raw[:4])[0] if len(raw) >= 4 else None
    if magic not in (_IMAGES_MAGIC, _LABELS_MAGIC):
        raise ValueError(f"{path} is not an idx file of bytes: its magic number is {magic}, expected 2049 or 2051.")
    ndim = magic & 0xFF
    start = 4 + 4 * ndim
    shape = struct.unpack(f">{ndim}I", raw[4:start])
    body = bytearray(raw[start:])
    if len(body) != torch.Size(shape).numel():
        raise ValueError(f"{path} announces shape {shape} but holds {len(body)} bytes; it is cut off or damaged.")
    return torch.frombuffer(body, dtype=torch.uint8).reshape(shape)


def load_pictures(split: str, folder: Path = DEBIAN_FOLDER) -> Pictures:
    """The "train" (60,000) or "t10k" (10,000) split, 28x28 padded by 2 black pixels on each side to 32x32."""
    parts = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        found = [path for path in (folder / f"{split}-{kind}.gz", folder / f"{split}-{kind}") if path.is_file()]
        if not found:
            raise FileNotFoundError(
                f"no {split}-{kind}[.gz] in {folder}. Install Debian's package dataset-fashion-mnist, or name the "
                "folder of the four idx files with --data."
            )
        parts.append(read_idx(found[0]))
    images, labels = parts
    if len(images) != len(labels) or images.shape[1:] != (28, 28):
        raise ValueError(f"{folder}: images {tuple(images.shape)} do not fit labels {tuple(labels.shape)} or 28x28.")
    return Pictures(torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None].contiguous(), labels.long())
