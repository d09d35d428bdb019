"""A Stable Diffusion or SDXL pipeline as one file in the layout of their first release, which other programs read.

The names are those of the latent-diffusion code: `input_blocks`, `middle_block` and `output_blocks` count a UNet's
layers through, where diffusers numbers the layers of each block.  diffusers reads this layout and does not write it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.teachers.single import TEXTS

FILE = "model.safetensors"
UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model.", "conditioner.embedders.0.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model.", "conditioner.embedders.1.model."
"""Before the names of each part; text encoders: those of Stable Diffusion, and of SDXL."""

ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "encoder.layers.": "transformer.resblocks.",
    "final_layer_norm.": "ln_final.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "self_attn.": "attn.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}
"""diffusers' names -> the original's: of a UNet's ends, its residual blocks, a VAE's attention, OpenCLIP's model."""


def check_layout(pipe: Any) -> None:
    """Raises ValueError for a pipeline that has no original layout here."""
    if type(pipe).__name__ not in TEXTS.values():
        raise ValueError(
            f"format single is the original layout of {' and '.join(sorted(set(TEXTS.values())))}, and "
            f"this student's is a {type(pipe).__name__}; export it as a pipeline"
        )


def write_single(pipe: Any, to: Path) -> str:
    """Save the pipeline's networks as one file, and beside it the configs that its parts are built from.

    Returns the lines that load it.
    """
    from diffusers import ConfigMixin
    from safetensors.torch import save_file

    tensors = original_layout(pipe)
    to.mkdir()
    save_file(tensors, to / FILE, metadata={"format": "pt"})
    pipe.save_config(to)
    for name, part in pipe.components.items():
        if isinstance(part, ConfigMixin):
            part.save_config(to / name)
        elif part is not None:  # of transformers: a model's config, a tokenizer or a picture processor as it is
            config: Any = part.config if isinstance(part, torch.nn.Module) else part
            config.save_pretrained(to / name)
    family = type(pipe).__name__
    return (
        f"from diffusers import {family}\n\n"
        f'pipe = {family}.from_single_file(f"{{folder}}/{FILE}", config=str(folder), dtype=torch.float32)'
    )


def original_layout(pipe: Any) -> dict[str, Tensor]:
    """All tensors of UNet, VAE and text encoders by their original names, in the dtypes that they have.

    Raises ValueError for a part of the UNet that the original has no name for.
    """
    check_layout(pipe)
    made = {UNET + _of_unet(name, pipe.unet): value for name, value in pipe.unet.state_dict().items()}
    made |= {f"{VAE}{name}": value for name, value in _of_vae(pipe.vae)}
    xl = type(pipe).__name__ == "StableDiffusionXLPipeline"
    # OpenAI's model, or since 2.0 OpenCLIP's, which has GELU; SDXL has one of each.
    open_clip = {pipe.text_encoder: not xl and pipe.text_encoder.config.hidden_act != "quick_gelu"}
    for encoder, is_open in (open_clip | ({pipe.text_encoder_2: True} if xl else {})).items():
        plain = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
        renamed = _of_open_clip(plain) if is_open else plain.items()
        made |= {(OPEN_CLIP if is_open else CLIP)[xl] + name: value for name, value in renamed}
    return {name: value.contiguous() for name, value in made.items()}


def _of_unet(name: str, unet: Any) -> str:
    layer, _, kind = name.rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{kind}"
    if found := re.fullmatch(r"mid_block\.(resnets|attentions)\.([01])\.(.+)", name):
        what, i, rest = found.groups()
        return f"middle_block.{1 if what == 'attentions' else 2 * int(i)}.{_in_block(rest)}"
    per_block = unet.config.layers_per_block
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found is None or not isinstance(per_block, int):
        raise ValueError(f"the original layout has no name for the UNet's {name}; export the student as a pipeline")
    side, block, what, i, rest = found.groups()
    first = int(block) * (per_block + 1)
    if what == "downsamplers":
        return f"input_blocks.{first + per_block + 1}.0.{rest.replace('conv', 'op')}"
    if what == "upsamplers":  # after the attention, where the block has one
        after = 2 if "Attn" in unet.config.up_block_types[int(block)] else 1
        return f"output_blocks.{first + per_block}.{after}.{rest}"
    place = f"input_blocks.{first + int(i) + 1}" if side == "down" else f"output_blocks.{first + int(i)}"
    return f"{place}.{int(what == 'attentions')}.{_in_block(rest)}"


def _in_block(rest: str) -> str:
    layer, _, kind = rest.rpartition(".")
    return f"{RESNET.get(layer, layer)}.{kind}"


def _of_vae(vae: Any) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.block_out_channels) - 1

    def block(found: re.Match[str]) -> str:
        side, i = found.groups()  # the decoder's are counted from the picture
        return f".{side}.{last - int(i) if side == 'up' else i}."

    for name, value in vae.state_dict().items():
        made = re.sub(r"\.(down|up)_blocks\.(\d+)\.", block, name)
        made = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", made)
        made = re.sub(r"(down|up)samplers\.0\.", r"\1sample.", made.replace(".resnets.", ".block."))
        made = made.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        if found := re.fullmatch(r"(.+\.)mid_block\.attentions\.0\.(.+)\.(\w+)", made):
            made = f"{found[1]}mid.attn_1.{ATTENTION[found[2]]}.{found[3]}"
            value = value[:, :, None, None] if value.ndim == 2 else value  # a convolution of 1x1 there
        yield made, value


def _of_open_clip(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Its projections of queries, keys and values are one tensor, and the last projection is from the right."""
    for name, value in state.items():
        if name == "text_projection.weight":
            yield "text_projection", value.T
            continue
        if found := re.fullmatch(r"(.+\.self_attn\.)([qkv])_proj\.(\w+)", name):
            if found[2] != "q":
                continue
            name = f"{found[1]}in_proj_{found[3]}"
            value = torch.cat([state[f"{found[1]}{which}_proj.{found[3]}"] for which in "qkv"])
        for ours, theirs in TEXT.items():
            name = name.replace(ours, theirs)
        yield name, value
