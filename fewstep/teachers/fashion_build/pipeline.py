"""The pipeline folder: its index and scheduler, the transformer's shape, encodings, and a plain sampler equal to it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import CogView4Pipeline, CogView4Transformer2DModel, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from fewstep.teachers.fashion_build.captions import MAX_TOKENS
from fewstep.teachers.fashion_build.loop import write_json

IMAGE_SIZE, LATENT_SIZE = 32, 8
NUM_TRAIN_TIMESTEPS = 1000


def new_transformer(channels: int, text_width: int) -> CogView4Transformer2DModel:
    """An untrained transformer of about 2.5M parameters: 6 blocks, width 128, patch 2, so 16 text and 16 image tokens.

    Modulations and the output start at zero, as in DiT's adaLN-Zero [arXiv:2212.09748 section 3.2]; diffusers does not.
    """
    model = CogView4Transformer2DModel(
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        text_embed_dim=text_width,
        time_embed_dim=128,
        condition_dim=16,
        pos_embed_max_size=LATENT_SIZE // 2,
        sample_size=LATENT_SIZE,
        rope_axes_dim=(LATENT_SIZE // 2, LATENT_SIZE // 2),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if ".attn1." in name:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif name.endswith("norm1.linear") or name in ("norm_out.linear", "proj_out"):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)
    return model


def write_index(folder: Path) -> None:
    """model_index.json and scheduler/: what `DiffusionPipeline.from_pretrained` reads first."""
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "transformer": ["diffusers", "CogView4Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "CogView4Pipeline", "_diffusers_version": diffusers.__version__, **parts}
    write_json(folder / "model_index.json", index)
    scheduler = FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS, shift=1.0, use_dynamic_shifting=False
    )
    scheduler.save_pretrained(folder / "scheduler")


def load_pipeline(folder: Path) -> Any:
    """The folder as the pipeline that it is, in fp32, from local files only, without gradients and progress bars."""
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def encode_captions(pipeline: CogView4Pipeline, captions: list[str]) -> Tensor:
    """The pipeline's own text encodings, hidden_states[-2] of 16 tokens: [len(captions), 16, D] float32."""
    return pipeline.encode_prompt(captions, None, False, max_sequence_length=MAX_TOKENS)[0]


def velocity(model: nn.Module, x_t: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """One call of the transformer as the pipeline makes it for a 32x32 picture.

    x_t: [B, C, 8, 8].  timestep: [B] in [0, 1000].  text: [B, 16, D].  Returns the estimate of eps - x0, [B, C, 8, 8].
    """
    size = torch.full((len(x_t), 2), float(IMAGE_SIZE))
    return model(x_t, text, timestep, size, size, torch.zeros(len(x_t), 2), return_dict=False)[0]


def pipeline_sigmas(num_steps: int) -> Tensor:
    """The grid that CogView4Pipeline uses: linspace(1000, 1, N) cut to whole timesteps, over 1000, then 0: [N + 1]."""
    steps = np.linspace(NUM_TRAIN_TIMESTEPS, 1.0, num_steps).astype(np.int64).astype(np.float32)
    return torch.cat([torch.from_numpy(steps / NUM_TRAIN_TIMESTEPS), torch.zeros(1)])


@torch.no_grad()
def euler_sample(
    model: nn.Module, noise: Tensor, text: Tensor, empty: Tensor, *, num_steps: int, guidance: float
) -> Tensor:
    """Euler steps of dx/dsigma = v on the pipeline's grid, v = v_empty + guidance (v_text - v_empty).

    noise: [B, C, 8, 8] standard normal.  text: [B, 16, D].  empty: [1, 16, D].  guidance <= 1 makes no second call, as
    in the pipeline.  Returns latents [B, C, 8, 8].
    """
    sigmas = pipeline_sigmas(num_steps)
    x_t = noise
    both = torch.cat([text, empty.expand_as(text)]) if guidance > 1 else text
    for sigma, following in pairwise(sigmas):
        doubled = torch.cat([x_t, x_t]) if guidance > 1 else x_t
        flow = velocity(model, doubled, (sigma * NUM_TRAIN_TIMESTEPS).expand(len(doubled)), both)
        if guidance > 1:
            cond, uncond = flow.chunk(2)
            flow = uncond + guidance * (cond - uncond)
        x_t = x_t + (following - sigma) * flow
    return x_t


def sample_noise(count: int, channels: int, *, seed: int, start: int = 0) -> Tensor:
    """Noise of samples start .. start + count - 1, each from its own CPU generator, seed + index: [N, C, 8, 8]."""
    shape = (channels, LATENT_SIZE, LATENT_SIZE)
    generators = (torch.Generator("cpu").manual_seed(seed + start + index) for index in range(count))
    return torch.stack([torch.randn(1, *shape, generator=generator)[0] for generator in generators])
