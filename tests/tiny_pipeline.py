"""A CogView4Pipeline folder in miniature, untrained, so that tests need neither the shipped weights nor a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LATENTS = (4, 4, 4)
PIXELS = 16


def tiny_transformer() -> Any:
    """A CogView4Transformer2DModel: two blocks of width 32 on the tiny latents; text of width 16."""
    from diffusers import CogView4Transformer2DModel

    return CogView4Transformer2DModel(
        patch_size=2,
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        text_embed_dim=16,
        time_embed_dim=32,
        condition_dim=16,
        pos_embed_max_size=LATENTS[1] // 2,
        sample_size=LATENTS[1],
        rope_axes_dim=(LATENTS[1] // 2, LATENTS[1] // 2),
    )


def build(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Write the folder: 4x4x4 latents, 16x16 grey pictures, two transformer blocks of width 32.  Returns it.

    scheduler: further settings of FlowMatchEulerDiscreteScheduler.
    """
    from diffusers import AutoencoderKL, CogView4Pipeline, FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    from fewstep.teachers.fashion_build.captions import MAX_TOKENS, build_tokenizer

    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        eos_token_id=tokenizer.eos_token_id,
        **ids,
    )
    vae = AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENTS[0],
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        sample_size=PIXELS,
    )
    pipe = CogView4Pipeline(
        tokenizer, CLIPTextModel(text), vae, tiny_transformer(), FlowMatchEulerDiscreteScheduler(**scheduler)
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
