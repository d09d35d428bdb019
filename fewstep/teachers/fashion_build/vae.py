"""Stage `vae`: a small AutoencoderKL, 32x32x1 -> 8x8xC, with latents of zero mean and unit variance per channel."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.metrics.features import dequantise, extract, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import Plan, read_notes, train, write_note
from fewstep.teachers.fashion_build.text import VisionTower, load_vision_tower

log = logging.getLogger(__name__)

LATENT_CHANNELS = 4
BATCH = 64
KL_WEIGHT = 3e-6
PERCEPTUAL_WEIGHT = 0.5
VAE_PLAN = Plan(
    name="vae", minutes=14.0, peak_lr=2e-3, warmup=0.05, weight_decay=0.01, ema=0.998, seed=3, save_every=120.0
)


def new_vae(channels: int = LATENT_CHANNELS) -> AutoencoderKL:
    """An untrained autoencoder: widths 16-32-64, one residual block per level, no attention."""
    shape: dict[str, Any] = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (16, 32, 64),
        "layers_per_block": 1,
        "latent_channels": channels,
        "norm_num_groups": 8,
        "sample_size": 32,
        "scaling_factor": 1.0,
        "mid_block_add_attention": False,
    }
    return AutoencoderKL(**shape)


def posterior_of(vae: AutoencoderKL, images: Tensor) -> DiagonalGaussianDistribution:
    """Mean and deviation of the latents of images [B, 1, 32, 32] in [-1, 1]."""
    return cast(Any, vae.encode(images)).latent_dist


def picture_of(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Decoder output, [B, 1, 32, 32], of latents [B, C, 8, 8] in the VAE's own scale."""
    return cast(Any, vae.decode(cast(Any, latents))).sample


class PerceptualDistance(nn.Module):
    """Mean squared difference of the vision tower's four activations, each divided by its variance over real images."""

    def __init__(self, tower: VisionTower, images: Tensor) -> None:
        super().__init__()
        self.tower = tower
        with torch.no_grad():
            self.scales = [1 / level.var() for level in tower.levels(images)]

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """images, targets: [B, 1, 32, 32] in [-1, 1].  Returns a scalar; no gradient reaches the targets."""
        with torch.no_grad():
            wanted = self.tower.levels(targets)
        pairs = zip(self.tower.levels(images), wanted, self.scales, strict=True)
        return torch.stack([scale * F.mse_loss(found, target) for found, target, scale in pairs]).sum()


def vae_loss(vae: AutoencoderKL, images: Tensor, noise: Tensor, perceptual: PerceptualDistance) -> Tensor:
    """|x - y| + (x - y)^2 + perceptual distance + a very small KL term, y the decoded sample of the posterior.

    images: [B, 1, 32, 32] in [-1, 1].  noise: [B, C, 8, 8] standard normal.  Returns a scalar.
    """
    posterior = posterior_of(vae, images)
    decoded = picture_of(vae, posterior.mean + posterior.std * noise)
    pixels = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
    return pixels + PERCEPTUAL_WEIGHT * perceptual(decoded, images) + KL_WEIGHT * posterior.kl().mean()


@torch.no_grad()
def latent_modes(vae: AutoencoderKL, images: Tensor, *, batch_size: int = 500) -> Tensor:
    """Posterior means.  images: [N, 1, 32, 32] uint8.  Returns [N, C, 8, 8] float32."""
    return torch.cat([posterior_of(vae, dequantise(part)).mean for part in images.split(batch_size)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, *, batch_size: int = 250) -> Tensor:
    """Pictures of latents [N, C, 8, 8], in [-1, 1] up to overshoot: [N, 1, 32, 32]."""
    parts = latents.split(batch_size)
    scale = cast(Any, vae.config).scaling_factor
    return torch.cat([picture_of(vae, part / scale) for part in parts])


@torch.no_grad()
def fold_statistics(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Change the 1x1 convolutions around the latent so that z' = (z - mean) / std, and nothing else changes.

    CogView4Pipeline only divides latents by scaling_factor, so the shift must live in the weights. mean, std: [C].
    quant_conv gives means and log variances, 2C rows; post_quant_conv takes z' back to z.
    """
    channels = len(mean)
    quant, post = cast(nn.Conv2d, vae.quant_conv), cast(nn.Conv2d, vae.post_quant_conv)
    assert quant.bias is not None and post.bias is not None
    quant.weight[:channels] /= std[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - mean) / std
    quant.bias[channels:] -= 2 * std.log()
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]


def reconstruction_fmd(vae: AutoencoderKL, images: Tensor, out: Path) -> float:
    """FMD between decode(encode(images)), posterior mean, and the training reference stored in out.  images: uint8."""
    folder = out / "fashion-classifier"
    features, _ = extract(load_fashion_classifier(folder), decode(vae, latent_modes(vae, images)))
    return moments_distance(Moments.of(features), load_reference(folder))


def build_vae(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Train, fold the latent statistics, store vae/ in fp16, and measure the gate on the stored weights."""
    if "vae" in read_notes(out):
        log.info("vae: finished before")
        return
    pictures, test_set = load_pictures("train", data), load_pictures("t10k", data)
    perceptual = PerceptualDistance(load_vision_tower(work), dequantise(pictures.images[:2000]))

    def loss_of(model: AutoencoderKL, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures.images), (BATCH,), generator=generator)
        noise = torch.randn(BATCH, LATENT_CHANNELS, 8, 8, generator=generator)
        images = dequantise(pictures.images[index]).contiguous(memory_format=torch.channels_last)
        return vae_loss(model, images, noise, perceptual)

    def watch(averaged: AutoencoderKL, used: float) -> None:
        decoded = decode(averaged, latent_modes(averaged, test_set.images[:2000]))
        error = F.mse_loss(decoded, dequantise(test_set.images[:2000]))
        distance = reconstruction_fmd(averaged, test_set.images[:2000], out)
        log.info("vae: %.1f min, mean squared error %.5f, FMD of 2,000 test images %.2f", used, error, distance)

    torch.manual_seed(VAE_PLAN.seed)
    plan = VAE_PLAN if minutes is None else replace(VAE_PLAN, minutes=minutes)
    network: AutoencoderKL = cast(Any, new_vae()).to(memory_format=torch.channels_last)
    vae = train(plan, network, loss_of, work, on_save=watch)
    finish_vae(plan, vae, pictures.images, test_set.images, out, work)


def finish_vae(plan: Plan, vae: AutoencoderKL, images: Tensor, test_images: Tensor, out: Path, work: Path) -> None:
    """Fold, store in fp16, reload in fp32 and note the gate's figure, measured on what was stored."""
    vae = cast(Any, vae).to(memory_format=torch.contiguous_format)
    modes = latent_modes(vae, images)
    fold_statistics(vae, modes.mean((0, 2, 3)), modes.std((0, 2, 3)))
    folder = out / "fashion-dit" / "vae"
    cast(Any, vae).half().save_pretrained(folder)
    stored = load_vae(out)
    modes = latent_modes(stored, images)
    decoded = decode(stored, latent_modes(stored, test_images))
    figures = {
        "fmd_of_10000_reconstructed_test_images": reconstruction_fmd(stored, test_images, out),
        "mean_squared_error": float(F.mse_loss(decoded, dequantise(test_images))),
        "latent_mean": modes.mean((0, 2, 3)).tolist(),
        "latent_std": modes.std((0, 2, 3)).tolist(),
    }
    write_note(out, work, plan, figures)


def load_vae(out: Path) -> AutoencoderKL:
    """The stored autoencoder in fp32 eval mode, without gradients."""
    vae = AutoencoderKL.from_pretrained(out / "fashion-dit" / "vae", dtype=torch.float32)
    return vae.eval().requires_grad_(False)
