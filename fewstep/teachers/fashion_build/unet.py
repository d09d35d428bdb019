"""Stage `unet`: the teacher `fashion-unet`, Stable Diffusion in miniature, whose UNet predicts eps on the same latents.

Tokenizer, text encoder and VAE are those of fashion-dit, copied with their notes, so that the folder stands alone.
"""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from fewstep.teachers.fashion_build.captions import all_captions, balanced_prompts
from fewstep.teachers.fashion_build.card import FEW, FEW_SEED, Cell, Draw, measure, suite_of
from fewstep.teachers.fashion_build.dit import draw_captions, precompute
from fewstep.teachers.fashion_build.loop import Plan, read_json, read_notes, train, write_json, write_note
from fewstep.teachers.fashion_build.pipeline import LATENT_SIZE, NUM_TRAIN_TIMESTEPS, load_pipeline, sample_noise
from fewstep.teachers.fashion_build.vae import decode

log = logging.getLogger(__name__)

TEACHER = "fashion-unet"
BATCH = 64  # of each of the two shards of a step
SNR_CAP = 5.0
FIGURE_EVERY = 10.0
FIGURE = Cell(steps=25, cfg=2.0, n=FEW, seed=FEW_SEED)
UNET_PLAN = Plan(name="unet", minutes=40.0, peak_lr=1e-3, warmup=0.03, weight_decay=0.01, ema=0.9995, seed=5, shards=2)


def new_unet(channels: int, text_width: int) -> UNet2DConditionModel:
    """An untrained UNet of about 2.5M parameters: width 64 at 8x8, then 96 with cross-attention to the text at 4x4.

    Attention at 8x8 would cost a third of the speed, and 16 tokens are what the transformer has, too.
    The last layer of every residual and attention block and of the whole start at zero, as in latent diffusion's
    `zero_module` [arXiv:2112.10752, its code]; diffusers does not.
    """
    model = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=text_width,
        attention_head_dim=cast(Any, (2, 3)),  # the number of heads, whatever its name: 32 channels each
    )
    for module in model.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
        elif isinstance(module, Transformer2DModel):
            _zero(cast(nn.Module, module.proj_out))
    _zero(model.conv_out)
    return model


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def new_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule, x_t = sqrt(a_t) x0 + sqrt(1 - a_t) eps, with a grid that starts at t = 999.

    sqrt(a_999) = 0.068, so the prior is matched only nearly; a one-step student starts from t = 999 all the same.
    steps_offset has no effect on "trailing" spacing, but StableDiffusionPipeline calls any other than 1 outdated.
    """
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def epsilon_loss(model: nn.Module, x0: Tensor, text: Tensor, eps: Tensor, t: Tensor, signal: Tensor) -> Tensor:
    """Mean squared error of eps, weighted by min(SNR, 5) / SNR with SNR = a / (1 - a)   [Min-SNR-5, arXiv:2303.09556]

    The weight takes capacity from the least noisy times, whose eps is hard to tell and matters little to the picture.
    x0, eps: [B, C, 8, 8].  text: [B, 16, D].  t: [B] int64 in 0..999, 0 = data.  signal: [1000], the schedule's a_t.
    Returns a scalar.
    """
    a = signal[t][:, None, None, None]
    guess = model(a.sqrt() * x0 + (1 - a).sqrt() * eps, t, text, return_dict=False)[0]
    weight = (SNR_CAP * (1 - a) / a).clamp(max=1)
    return (weight * (guess - eps).square()).mean()


def copy_parts(out: Path) -> None:
    """Copy the parts that fashion-dit has finished and their notes; add the index and scheduler of a pipeline."""
    notes = {stage: note for stage, note in read_notes(out).items() if stage in ("text", "vae")}
    if len(notes) < 2:
        raise FileNotFoundError(f"{out / 'fashion-dit'} has no finished text encoder and VAE; run those stages first.")
    folder = out / TEACHER
    for part in ("tokenizer", "text_encoder", "vae"):
        shutil.copytree(out / "fashion-dit" / part, folder / part, dirs_exist_ok=True)
    write_json(folder / "build.json", notes)
    new_scheduler().save_pretrained(folder / "scheduler")
    parts = {
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": diffusers.__version__, **parts}
    write_json(folder / "model_index.json", index)


@torch.no_grad()
def encode_for_unet(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """The pipeline's own text encodings, last_hidden_state after the final norm: [len(captions), 16, D] float32.

    Not fashion-dit's, whose pipeline reads the layer before.
    """
    return pipeline.encode_prompt(captions, torch.device("cpu"), 1, False)[0]


def pipeline_draw(pipeline: StableDiffusionPipeline) -> Draw:
    """Pictures by diffusers' own pipeline, which needs nothing of fewstep: what the figure during training is made of.

    Workers may share it: each call sets the scheduler's grid, but all calls of a cell set the same one.
    """

    def draw(cell: Cell, first: int, count: int) -> Tensor:
        prompts, _ = balanced_prompts(count, first)
        noise = sample_noise(count, cast(Any, pipeline.unet).config.in_channels, seed=cell.seed, start=first)
        found = pipeline(
            prompts,
            latents=noise,
            num_inference_steps=cell.steps,
            guidance_scale=cell.cfg,
            output_type="latent",
        )
        return decode(pipeline.vae, cast(Any, found).images)

    return draw


def save_unet(model: UNet2DConditionModel, out: Path) -> None:
    """Store the UNet in fp16."""
    copy.deepcopy(model).half().save_pretrained(out / TEACHER / "unet")


def build_unet(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Train the UNet; its averaged weights reach the folder every ten minutes, with a figure, and at the end."""
    if "unet" in read_notes(out, TEACHER):
        log.info("unet: finished before")
        return
    torch.manual_seed(UNET_PLAN.seed)
    latents, labels = precompute(data, out, work)
    copy_parts(out)
    folder, workers = out / TEACHER, torch.get_num_threads()
    width = read_json(folder / "text_encoder" / "config.json")["hidden_size"]
    model = new_unet(latents.shape[1], width)
    if not (folder / "unet").is_dir():
        save_unet(model, out)
    texts = encode_for_unet(load_pipeline(folder), [*all_captions(), ""])
    signal = new_scheduler().alphas_cumprod

    def loss_of(net: UNet2DConditionModel, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        text = texts[draw_captions(labels[index], generator)]
        eps = torch.randn(BATCH, *latents.shape[1:], generator=generator)
        t = torch.randint(NUM_TRAIN_TIMESTEPS, (BATCH,), generator=generator)
        return epsilon_loss(net, latents[index], text, eps, t, signal)

    last = 0.0

    def watch(averaged: UNet2DConditionModel, used: float) -> None:
        nonlocal last
        if used - last >= FIGURE_EVERY:
            save_unet(averaged, out)
            row = measure(pipeline_draw(load_pipeline(folder)), suite_of(out), FIGURE, workers=workers)
            log.info("unet: %.1f min, %s", used, row)
            last = used

    plan = UNET_PLAN if minutes is None else replace(UNET_PLAN, minutes=minutes)
    save_unet(train(plan, model, loss_of, work, on_save=watch), out)
    write_note(out, work, plan, {}, TEACHER)
