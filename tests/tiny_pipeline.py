"""Pipeline folders in miniature, untrained, so that tests need neither the shipped weights nor a network."""

from __future__ import annotations

from collections.abc import Mapping
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


def tiny_vae(*, attention: bool = False) -> Any:
    """An AutoencoderKL between 16x16 grey pictures and the tiny latents, with attention in the middle or without."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        latent_channels=LATENTS[0],
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        mid_block_add_attention=attention,
        scaling_factor=0.7,
        sample_size=PIXELS,
    )


def tiny_tokenizer(max_tokens: int) -> Any:
    """The embedded teachers' tokenizer for that many tokens."""
    from fewstep.teachers.fashion_build.captions import build_tokenizer

    tokenizer = build_tokenizer()
    tokenizer.model_max_length = max_tokens
    return tokenizer


def tiny_text(tokenizer: Any, *, projected: bool = False, width: int = 16, act: str = "quick_gelu") -> Any:
    """A CLIPTextModel of this width, or one that projects the whole prompt to 16 numbers, too."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id}
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        hidden_act=act,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        eos_token_id=tokenizer.eos_token_id,
        **ids,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(text)


def build(folder: Path, *, seed: int = 0, max_tokens: int = 16, **scheduler: Any) -> Path:
    """Write the folder: 4x4x4 latents, 16x16 grey pictures, two transformer blocks of width 32.  Returns it.

    scheduler: further settings of FlowMatchEulerDiscreteScheduler.
    """
    from diffusers import CogView4Pipeline, FlowMatchEulerDiscreteScheduler

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(max_tokens)
    text = tiny_text(tokenizer)
    pipe = CogView4Pipeline(
        tokenizer, text, tiny_vae(), tiny_transformer(), FlowMatchEulerDiscreteScheduler(**scheduler)
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_unet(text: int = 16, **more: Any) -> Any:
    """A UNet2DConditionModel of width 8 and 16 on the tiny latents; text of that width."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENTS[1],
        in_channels=LATENTS[0],
        out_channels=LATENTS[0],
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=text,
        attention_head_dim=2,
        **more,
    )


BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
"""Stable Diffusion's."""


def build_stable_diffusion(
    folder: Path,
    *,
    seed: int = 0,
    scheduler: str = "DDIMScheduler",
    attention: bool = False,
    act: str = "quick_gelu",
    **settings: Any,
) -> Path:
    """Write a StableDiffusionPipeline on the same latents and pictures, with Stable Diffusion's betas.  Returns it.

    scheduler: the class's name in diffusers.  attention: in the VAE.  act: the text encoder's activation, "gelu" since
    2.0.  settings: further ones of the scheduler.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    text = tiny_text(tokenizer, act=act)
    betas = BETAS | ({"set_alpha_to_one": False, "clip_sample": False} if scheduler == "DDIMScheduler" else {})
    pipe = diffusers.StableDiffusionPipeline(
        tiny_vae(attention=attention),
        text,
        tokenizer,
        tiny_unet(),
        getattr(diffusers, scheduler)(**(betas | settings)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_t5(tokenizer: Any, width: int = 16) -> Any:
    """A T5EncoderModel of that width."""
    from transformers import T5Config, T5EncoderModel

    sizes: dict[str, Any] = {"d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5EncoderModel(T5Config(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes))


def build_sd3(folder: Path, *, seed: int = 0, network: Mapping[str, Any] = {}, **scheduler: Any) -> Path:
    """Write a StableDiffusion3Pipeline on the same latents and pictures, its text 40 wide.  Returns it.

    network, scheduler: further settings of SD3Transformer2DModel and FlowMatchEulerDiscreteScheduler.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    texts = [tiny_text(tokenizer, projected=True) for _ in range(2)]
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=LATENTS[1], in_channels=LATENTS[0], out_channels=LATENTS[0], num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=40, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, **network,
    )  # fmt: skip
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.3)
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**scheduler)
    third = tiny_t5(tokenizer, 40), tokenizer
    pipe = diffusers.StableDiffusion3Pipeline(transformer, noise, vae, texts[0], tokenizer, texts[1], tokenizer, *third)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_flux(folder: Path, *, seed: int = 0, network: Mapping[str, Any] = {}, **scheduler: Any) -> Path:
    """Write a FluxPipeline on latents of the same channels and pictures, its text 40 wide.  Returns it.

    By default it makes pictures of 128 latents a side, as every FluxPipeline.
    network, scheduler: further settings of FluxTransformer2DModel and FlowMatchEulerDiscreteScheduler.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    text = tiny_text(tokenizer)
    sizes: dict[str, Any] = {
        "in_channels": 4 * LATENTS[0], "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 40, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    }  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(**(sizes | dict(network)))
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.3)
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**({"use_dynamic_shifting": True} | scheduler))
    pipe = diffusers.FluxPipeline(noise, vae, text, tokenizer, tiny_t5(tokenizer, 40), tokenizer, transformer)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_pixart(folder: Path, *, seed: int = 0, network: Mapping[str, Any] = {}, **scheduler: Any) -> Path:
    """Write a PixArtSigmaPipeline on the same latents and pictures, its text 40 wide.  Returns it.

    network: further settings of PixArtTransformer2DModel.  scheduler: of DDIMScheduler, or another by `name`.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    sizes: dict[str, Any] = {
        "sample_size": LATENTS[1], "in_channels": LATENTS[0], "out_channels": 2 * LATENTS[0], "num_layers": 2,
        "attention_head_dim": 12, "num_attention_heads": 2, "cross_attention_dim": 24, "caption_channels": 40,
    }  # fmt: skip
    transformer = diffusers.PixArtTransformer2DModel(**(sizes | dict(network)))
    name = scheduler.pop("name", "DDIMScheduler")
    betas = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    ddim = {"set_alpha_to_one": False, "clip_sample": False, "steps_offset": 1} if name == "DDIMScheduler" else {}
    noise = getattr(diffusers, name)(**(betas | ddim | scheduler))
    pipe = diffusers.PixArtSigmaPipeline(tokenizer, tiny_t5(tokenizer, 40), tiny_vae(), transformer, noise)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_sana(folder: Path, *, seed: int = 0, scheduler: Any = None, **settings: Any) -> Path:
    """Write a SanaPipeline: latents of 4x4 for pictures of 32x32 in colour, its text 16 wide.  Returns it.

    scheduler: by default FlowMatchEulerDiscreteScheduler with `settings`.
    """
    import diffusers
    from transformers import Gemma2Config, Gemma2Model

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    text = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=LATENTS[0], out_channels=LATENTS[0], num_attention_heads=2, attention_head_dim=16, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=16,
        sample_size=LATENTS[1],
    )  # fmt: skip
    widths: dict[str, Any] = {
        f"{part}_{name}": value
        for part in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8, 8, 16, 16), "layers_per_block": (1, 1, 1, 1),
            "qkv_multiscales": ((), (), (), (5,)),
            "block_types": ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        }.items()
    }  # fmt: skip
    vae = diffusers.AutoencoderDC(latent_channels=LATENTS[0], attention_head_dim=8, scaling_factor=0.7, **widths)
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**settings) if scheduler is None else scheduler
    pipe = diffusers.SanaPipeline(tokenizer, Gemma2Model(text), vae, transformer, noise)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_qwen(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Write a QwenImagePipeline: latents of the same channels, colour pictures four times their size.  Returns it.

    By default it makes pictures of 128 latents a side, as every QwenImagePipeline.
    scheduler: further settings of FlowMatchEulerDiscreteScheduler.
    """
    import diffusers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    words: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    sights: dict[str, Any] = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "fullatt_block_indexes": [0],
    }  # fmt: skip
    marks: dict[str, Any] = {f"{name}_token_id": 1 for name in ("image", "video", "vision_start", "vision_end")}
    text = Qwen2_5_VLConfig(text_config=words, vision_config=sights, **marks)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=4 * LATENTS[0], out_channels=LATENTS[0], num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=LATENTS[0], dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.7, 1.5, 1.0, 2.0],
    )  # fmt: skip
    shifted = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_image_seq_len": 8192, "max_shift": 0.9}
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**(shifted | scheduler))
    pipe = diffusers.QwenImagePipeline(noise, vae, Qwen2_5_VLForConditionalGeneration(text), tokenizer, transformer)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


FILM = (4, 2, 4, 4)
"""Latents of five frames of 16x16."""


def build_wan(
    folder: Path, *, seed: int = 0, scheduler: Any = None, boundary: float | None = None, **settings: Any
) -> Path:
    """Write a WanPipeline: 4 channels, 4x4 pixels and 4 frames a latent, two blocks of width 24.  Returns it.

    scheduler: by default FlowMatchEulerDiscreteScheduler with `settings`.  boundary: of times; with it there are two
    networks.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    sizes: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": FILM[0], "out_channels": FILM[0],
        "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 16,
    }  # fmt: skip
    networks = [diffusers.WanTransformer3DModel(**sizes)]
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=FILM[0], dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.7, 1.5, 1.0, 2.0], scale_factor_spatial=4,
    )  # fmt: skip
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**settings) if scheduler is None else scheduler
    text = tiny_t5(tokenizer)
    networks += [] if boundary is None else [diffusers.WanTransformer3DModel(**sizes)]
    pipe = diffusers.WanPipeline(tokenizer, text, vae, noise, *networks, boundary_ratio=boundary)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_stable_diffusion_xl(
    folder: Path,
    *,
    seed: int = 0,
    scheduler: str = "EulerDiscreteScheduler",
    zeros: bool = True,
    attention: bool = False,
    width: int = 16,
    **settings: Any,
) -> Path:
    """Write a StableDiffusionXLPipeline on the same latents and pictures, its text 16 + `width` wide.  Returns it.

    zeros: force_zeros_for_empty_prompt.  The rest as in `build_stable_diffusion`.
    """
    import diffusers

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(16)
    texts = tiny_text(tokenizer), tiny_text(tokenizer, projected=True, width=width, act="gelu")
    told = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = tiny_unet(16 + width, projection_class_embeddings_input_dim=6 * 8 + 16, **told)
    noise = getattr(diffusers, scheduler)(**(BETAS | {"timestep_spacing": "leading"} | settings))
    pipe = diffusers.StableDiffusionXLPipeline(
        tiny_vae(attention=attention), *texts, tokenizer, tokenizer, unet, noise, force_zeros_for_empty_prompt=zeros
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


CLASSES = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "crane", "3": "crane"}
"""Numbers -> names, two of which are one, as two of ImageNet's are."""


def build_dit(folder: Path, *, seed: int = 0, classes: Mapping[str, str] = CLASSES, **scheduler: Any) -> Path:
    """Write a DiTPipeline of 1000 classes on the same latents and pictures, with learnt variance.  Returns it.

    classes: names of some.  scheduler: further settings of DDIMScheduler.
    """
    import diffusers

    torch.manual_seed(seed)
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=LATENTS[0], out_channels=2 * LATENTS[0],
        num_layers=2, sample_size=LATENTS[1],
    )  # fmt: skip
    noise = diffusers.DDIMScheduler(**({"beta_schedule": "linear", "clip_sample": False} | scheduler))
    pipe = diffusers.DiTPipeline(network, tiny_vae(), noise)
    pipe.register_to_config(id2label=dict(classes))  # as its publisher's index has it
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder


def build_z_image(folder: Path, *, seed: int = 0, **scheduler: Any) -> Path:
    """Write a ZImagePipeline on latents of the same channels and pictures, its text 16 wide.  Returns it.

    By default it makes pictures of 128 latents a side, as every ZImagePipeline.
    scheduler: further settings of FlowMatchEulerDiscreteScheduler.
    """
    import diffusers
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer(64)
    tokenizer.chat_template = "user: {{ messages[0].content }}, answer:"
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=LATENTS[0], dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[1024, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.normal_(token)
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.3)
    noise = diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 6.0} | scheduler))
    pipe = diffusers.ZImagePipeline(noise, vae, Qwen3Model(text), tokenizer, transformer)
    pipe.save_pretrained(folder, safe_serialization=True)
    return folder
