"""Stage `reals`: 10,000 training images as latents of the shipped VAE, real samples for the GAN and the metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL

from fewstep.metrics.features import dequantise, file_sha256
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import write_json, write_tensors
from fewstep.teachers.fashion_build.references import PER_CLASS, first_of_each_class

log = logging.getLogger(__name__)

LICENCE = """Fashion-MNIST, Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


@torch.no_grad()
def build_reals(data: Path, out: Path, work: Path, minutes: float | None = None, *, per_class: int = PER_CLASS) -> None:
    """Write fashion-reals/: latents [N, 4, 8, 8] float16, labels [N] uint8, a card and the data's licence.

    The images are those of stage `references`, the first ones of each class; number i of them has for a caption
    template i mod 10 of its class.
    """
    folder = out / "fashion-reals"
    if (folder / "card.json").is_file():
        log.info("reals: %s is there", folder)
        return
    vae = cast(Any, AutoencoderKL.from_pretrained(out / "fashion-dit" / "vae", torch_dtype=torch.float32)).eval()
    images, labels = load_pictures("train", data)
    chosen = first_of_each_class(labels, per_class)
    parts = [vae.encode(dequantise(part)).latent_dist.mode() for part in images[chosen].split(500)]
    latents = torch.cat(parts)
    stored = {"latents": latents.half(), "labels": labels[chosen].to(torch.uint8)}
    write_tensors(folder / "latents.safetensors", stored)
    (folder / "LICENSE").write_text(LICENCE, encoding="utf-8")
    card = {
        "data": f"Fashion-MNIST, the first {per_class} training images of each class (Zalando SE, MIT), 32x32",
        "count": len(latents),
        "encoder": "mode of fashion-dit's VAE",
        "vae_sha256": file_sha256(out / "fashion-dit" / "vae" / "diffusion_pytorch_model.safetensors"),
        "latents_sha256": file_sha256(folder / "latents.safetensors"),
        "mean": float(latents.mean()),
        "std": float(latents.std()),
    }
    write_json(folder / "card.json", card)
    log.info("reals: %s", card)
