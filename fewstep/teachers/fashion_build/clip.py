"""Stage `clip`: a ViT trained against the pipeline's own frozen text encoder, stored as a transformers CLIPModel.

The model measures only (`fewstep.metrics.clip_score`). Its vision tower shares neither weights nor architecture with
the convolutional tower of stage `text`, which is the VAE's perceptual distance: a CLIP score by that one would reward
what the VAE was trained on.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextModel, CLIPTokenizer

from fewstep.metrics.clip_score import WEIGHTS, ClipScorer, read_clip
from fewstep.metrics.features import dequantise, file_sha256
from fewstep.teachers.fashion_build.captions import CLASS_NAMES, TEMPLATES, all_captions
from fewstep.teachers.fashion_build.data import Pictures, load_pictures
from fewstep.teachers.fashion_build.loop import Plan, train, write_json
from fewstep.teachers.fashion_build.text import WIDTH, caption_tokens, contrastive_loss

log = logging.getLogger(__name__)

BATCH = 125
# Patches of 8 pixels: with 4 a picture costs four and a half times as much, and this stage has minutes on one core.
VISION = {
    "hidden_size": 96,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 1,
}
CLIP_PLAN = Plan(
    name="clip",
    minutes=12.0,
    steps=5 * 60000 // BATCH,
    peak_lr=2e-3,
    warmup=0.1,
    weight_decay=0.05,
    ema=0.998,
    seed=5,
)


class Trained(nn.Module):
    """The parts of a CLIPModel that are trained: vision tower, both projections, temperature. The text tower is not."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.vision_model = clip.vision_model
        self.visual_projection = clip.visual_projection
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale

    def forward(self, images: Tensor, pooled: Tensor) -> Tensor:
        """Scaled cosines.  images: [B, 1, 32, 32] in [-1, 1].  pooled: [T, 64] of the text tower.  Returns [B, T]."""
        seen = F.normalize(self.visual_projection(self.vision_model(pixel_values=images).pooler_output), dim=1)
        read = F.normalize(self.text_projection(pooled), dim=1)
        return self.logit_scale.exp().clamp(max=100) * seen @ read.T


def new_clip(text: CLIPTextModel) -> CLIPModel:
    """A CLIPModel around a text tower, whose weights it takes over and freezes; the rest is untrained."""
    config = CLIPConfig(text_config=text.config.to_dict(), vision_config=VISION, projection_dim=WIDTH)
    clip = CLIPModel(config)
    clip.text_model.load_state_dict(text.state_dict())
    clip.text_model.eval().requires_grad_(False)
    return clip


def build_clip(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Train, store fashion-clip/ (fp16 weights, tokenizer, image processor), and write its card."""
    folder = out / "fashion-clip"
    if (folder / "card.json").is_file():
        log.info("clip: finished before, %s", folder)
        return
    tokenizer = CLIPTokenizer.from_pretrained(out / "fashion-dit" / "tokenizer")
    text = CLIPTextModel.from_pretrained(out / "fashion-dit" / "text_encoder", dtype=torch.float32)
    tokens, classes = caption_tokens(tokenizer)
    pictures, test_set = load_pictures("train", data), load_pictures("t10k", data)
    torch.manual_seed(CLIP_PLAN.seed)
    clip = new_clip(text)
    with torch.no_grad():
        pooled = clip.text_model(input_ids=tokens).pooler_output

    def loss_of(model: Trained, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures.images), (BATCH,), generator=generator)
        scores = model(dequantise(pictures.images[index]), pooled)
        return contrastive_loss(scores, pictures.labels[index][:, None] == classes[None])

    @torch.no_grad()
    def watch(averaged: Trained, used: float) -> None:
        nearest = averaged(dequantise(test_set.images[:2000]), pooled).argmax(1)
        share = float((classes[nearest] == test_set.labels[:2000]).double().mean())
        log.info("clip: %.1f min, zero-shot accuracy %.4f on 2,000 test images", used, share)

    plan = CLIP_PLAN if minutes is None else replace(CLIP_PLAN, minutes=minutes, steps=None)
    trained = train(plan, Trained(clip), loss_of, work, on_save=watch)
    clip.load_state_dict(trained.state_dict(), strict=False)  # all but the text tower
    save_clip(clip, tokenizer, folder)
    spent = json.loads((work / "clip.json").read_text(encoding="utf-8"))
    write_card(folder, test_set, spent["iteration"] * BATCH / len(pictures.images))


def save_clip(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Model in fp16 (asking for fp32, as the text encoder does), tokenizer and image processor."""
    cast(Any, clip).half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": "float32"})
    tokenizer.save_pretrained(folder)
    side = VISION["image_size"]
    CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=[0.5],
        image_std=[0.5],
        do_convert_rgb=False,
    ).save_pretrained(folder)


@torch.no_grad()
def card_figures(scorer: ClipScorer, pictures: Pictures) -> dict[str, float]:
    """Zero-shot accuracy, and mean scores of pictures with the captions of their own class and of the nine others."""
    classes = torch.arange(len(CLASS_NAMES)).repeat_interleave(len(TEMPLATES))
    read = scorer.embed_texts(all_captions())
    cosines = torch.cat([scorer.embed_images(part) for part in pictures.images.split(500)]) @ read.T
    own = pictures.labels[:, None] == classes[None]
    return {
        "zero_shot_accuracy": float((classes[cosines.argmax(1)] == pictures.labels).double().mean()),
        "clip_score_of_test_images_with_own_captions": 100 * float(cosines[own].double().mean()),
        "clip_score_of_test_images_with_wrong_captions": 100 * float(cosines[~own].double().mean()),
    }


def write_card(folder: Path, test_set: Pictures, epochs: float) -> None:
    """Measure the model as stored and write card.json."""
    scorer = read_clip(folder)
    parameters = {
        "text tower (of fashion-dit, unchanged)": scorer.model.text_model,
        "vision tower": scorer.model.vision_model,
        "all": scorer.model,
    }
    card = card_figures(scorer, test_set) | {
        "sha256": file_sha256(folder / WEIGHTS),
        "n_test_images": len(test_set.images),
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parameters.items()},
        "training": {"images": 60000, "epochs": epochs, "batch": BATCH, "seed": CLIP_PLAN.seed, "augmentation": "none"},
        "independence": "the vision tower is neither the one that was the VAE's perceptual distance nor the metric's "
        "classifier, and trained nothing; the text tower is the teacher's own, frozen",
        "licence": "weights Apache-2.0; data Fashion-MNIST, MIT",
        "use": "measurement only; it must not train a generator, a discriminator or a VAE",
    }
    write_json(folder / "card.json", card)
    log.info("clip: %s", card)
