"""Stage `dit`: flow matching of the transformer on the VAE's latents, conditioned through the pipeline's encodings."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import CogView4Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.metrics.features import file_sha256
from fewstep.teachers.fashion_build.captions import CLASS_NAMES, TEMPLATES, all_captions
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import Plan, read_notes, train, write_note, write_tensors
from fewstep.teachers.fashion_build.pipeline import (
    NUM_TRAIN_TIMESTEPS,
    encode_captions,
    load_pipeline,
    new_transformer,
    velocity,
    write_index,
)
from fewstep.teachers.fashion_build.vae import latent_modes, load_vae

log = logging.getLogger(__name__)

BATCH = 64  # of each of the two shards of a step
DROPOUT = 0.1
SNAPSHOT_EVERY = 5.0
DIT_PLAN = Plan(name="dit", minutes=50.0, peak_lr=1.5e-3, warmup=0.03, weight_decay=0.01, ema=0.9995, seed=4, shards=2)


def flow_matching_loss(model: nn.Module, x0: Tensor, text: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Mean squared error of the velocity, x_t = (1 - t) x0 + t eps, target eps - x0   [arXiv:2403.03206 eq. 13]

    x0, eps: [B, C, 8, 8].  text: [B, 16, D].  t: [B] in [0, 1], 0 = data.  Returns a scalar.
    """
    weight = t[:, None, None, None]
    x_t = (1 - weight) * x0 + weight * eps
    return F.mse_loss(velocity(model, x_t, NUM_TRAIN_TIMESTEPS * t, text), eps - x0)


def draw_captions(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A caption's row in the encodings for each label: a random template, or with probability 0.1 the last row, "".

    labels: [B] int64 in 0..9.  Returns [B] int64 in 0..100.
    """
    template = torch.randint(len(TEMPLATES), labels.shape, generator=generator)
    empty = torch.rand(labels.shape, generator=generator) < DROPOUT
    return torch.where(empty, len(CLASS_NAMES) * len(TEMPLATES), labels * len(TEMPLATES) + template)


def precompute(data: Path, out: Path, work: Path) -> tuple[Tensor, Tensor]:
    """Latents [60000, C, 8, 8] of the training images, computed once for the stored VAE, and their labels [60000]."""
    pictures = load_pictures("train", data)
    digest = file_sha256(out / "fashion-dit" / "vae" / "diffusion_pytorch_model.safetensors")
    path = work / f"latents-{digest[:16]}.safetensors"
    if not path.is_file():
        write_tensors(path, {"latents": latent_modes(load_vae(out), pictures.images)})
    return load_file(path)["latents"], pictures.labels


def save_transformer(model: CogView4Transformer2DModel, out: Path) -> None:
    """Store the transformer in fp16 with the index beside it, so that the folder loads as a pipeline."""
    folder = out / "fashion-dit"
    copy.deepcopy(model).half().save_pretrained(folder / "transformer")
    write_index(folder)


def text_encodings(out: Path) -> Tensor:
    """Encodings of all captions and, last, of the empty prompt, through the pipeline itself: [101, 16, D]."""
    return encode_captions(load_pipeline(out / "fashion-dit"), [*all_captions(), ""])


def build_dit(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Train the transformer; its averaged weights reach the pipeline folder every five minutes and at the end."""
    if "dit" in read_notes(out):
        log.info("dit: finished before")
        return
    torch.manual_seed(DIT_PLAN.seed)
    latents, labels = precompute(data, out, work)
    width = json.loads((out / "fashion-dit" / "text_encoder" / "config.json").read_text(encoding="utf-8"))[
        "hidden_size"
    ]
    model = new_transformer(latents.shape[1], width)
    if not (out / "fashion-dit" / "transformer").is_dir():
        save_transformer(model, out)
    texts = text_encodings(out)

    def loss_of(net: CogView4Transformer2DModel, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        text = texts[draw_captions(labels[index], generator)]
        eps = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        t = torch.randn(BATCH, generator=generator).sigmoid()
        return flow_matching_loss(net, latents[index], text, eps, t)

    last = 0.0

    def snapshot(averaged: CogView4Transformer2DModel, used: float) -> None:
        nonlocal last
        if used - last >= SNAPSHOT_EVERY:
            save_transformer(averaged, out)
            last = used

    plan = DIT_PLAN if minutes is None else replace(DIT_PLAN, minutes=minutes)
    save_transformer(train(plan, model, loss_of, work, on_save=snapshot), out)
    write_note(out, work, plan, {})
