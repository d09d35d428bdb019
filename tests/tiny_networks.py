"""Small untrained networks of diffusers' families: (network, f of a state and a time in [0, 1], a state)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_pipeline import LATENTS, tiny_transformer, tiny_unet

Made = tuple[Any, Callable[[Tensor, Tensor], Tensor], Tensor]
BATCH, TEXT, WIDTH = 2, 7, 32


def made(name: str, **sizes: int) -> Made:
    """A family's network in evaluation mode, none of whose weights is all zeros, and how it is called.

    sizes: arguments of the family's function.
    """
    torch.manual_seed(0)
    network, call, shape = FAMILIES[name](**sizes)
    for parameter in network.parameters():
        if not parameter.any():  # gates that are shut at first would hide what is behind them
            nn.init.normal_(parameter, std=0.02)
    return network.eval(), call, torch.randn(BATCH, *shape)


def _text() -> Tensor:
    return torch.randn(BATCH, TEXT, WIDTH)


def sd3(layers: int = 2, heads: int = 4, size: int = 16) -> Any:
    """Stable Diffusion 3.5: joint attention, normalised queries and keys, one block with a second attention."""
    from diffusers import SD3Transformer2DModel

    network = SD3Transformer2DModel(
        sample_size=size,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16 * heads,
        pooled_projection_dim=24,
        pos_embed_max_size=size,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    text, pooled = _text(), torch.randn(BATCH, 24)
    told = {"encoder_hidden_states": text, "pooled_projections": pooled, "return_dict": False}
    return network, lambda x, t: network(hidden_states=x, timestep=1000 * t, **told)[0], (4, size, size)


def flux(layers: int = 1, heads: int = 4, side: int = 8) -> Any:
    """Flux: joint and parallel blocks, rotary positions, told its guidance; a state is a row of patches."""
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=layers,
        num_single_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    places = torch.zeros(side * side, 3)
    places[:, 1:] = torch.cartesian_prod(torch.arange(side), torch.arange(side))
    told = {
        "encoder_hidden_states": _text(),
        "pooled_projections": torch.randn(BATCH, 24),
        "guidance": torch.full((BATCH,), 3.5),
        "txt_ids": torch.zeros(TEXT, 3),
        "img_ids": places,
        "return_dict": False,
    }
    return network, lambda x, t: network(hidden_states=x, timestep=t, **told)[0], (side * side, 16)


def qwen(layers: int = 2, heads: int = 4, side: int = 4) -> Any:
    """Qwen-Image: joint attention, complex rotary positions, texts of several lengths behind a mask."""
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    mask = torch.ones(BATCH, TEXT, dtype=torch.bool)
    mask[1, 4:] = False
    told = {
        "encoder_hidden_states": _text(),
        "encoder_hidden_states_mask": mask,
        "img_shapes": [[(1, side, side)]] * BATCH,
        "return_dict": False,
    }
    return network, lambda x, t: network(hidden_states=x, timestep=t, **told)[0], (side * side, 16)


def wan(layers: int = 2, heads: int = 4, frames: int = 3, size: int = 8) -> Any:
    """Wan 2.1: video latents."""
    from diffusers import WanTransformer3DModel

    network = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=48 * heads,
        num_layers=layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    text = _text()
    call = lambda x, t: network(x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]  # noqa: E731
    return network, call, (4, frames, size, size)


def sana() -> Any:
    """Sana: linear attention and convolutions in its feed-forward part."""
    from diffusers import SanaTransformer2DModel

    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
    )
    text = _text()
    call = lambda x, t: network(x, timestep=1000 * t, encoder_hidden_states=text, return_dict=False)[0]  # noqa: E731
    return network, call, (4, 8, 8)


def pixart() -> Any:
    """PixArt: texts of several lengths behind a mask."""
    from diffusers import PixArtTransformer2DModel

    network = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=16,
        patch_size=2,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )
    mask = torch.ones(BATCH, TEXT)
    mask[1, 4:] = 0
    told = {
        "encoder_hidden_states": _text(),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }
    return network, lambda x, t: network(x, timestep=1000 * t, **told)[0], (4, 16, 16)


def dit() -> Any:
    """DiT: classes."""
    from diffusers import DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    )
    labels = torch.tensor([1, 2])
    call = lambda x, t: network(x, timestep=1000 * t, class_labels=labels, return_dict=False)[0]  # noqa: E731
    return network, call, (4, 8, 8)


def cogview4() -> Any:
    """The family of fashion-dit; told the size of its pictures."""
    network, text, size = tiny_transformer(), torch.randn(BATCH, TEXT, 16), torch.full((BATCH, 2), 4)
    told = {"original_size": size, "target_size": size, "crop_coords": torch.zeros(BATCH, 2), "return_dict": False}
    return network, lambda x, t: network(x, text, 1000 * t, **told)[0], LATENTS


def unet() -> Any:
    """The family of fashion-unet and Stable Diffusion."""
    network, text = tiny_unet(), torch.randn(BATCH, TEXT, 16)
    return network, lambda x, t: network(x, 1000 * t, text, return_dict=False)[0], LATENTS


FAMILIES: dict[str, Callable[..., Any]] = {
    "sd3": sd3,
    "flux": flux,
    "qwen": qwen,
    "wan": wan,
    "sana": sana,
    "pixart": pixart,
    "dit": dit,
    "cogview4": cogview4,
    "unet": unet,
}
