"""Stage `text`: the tokenizer, and a small CLIP text encoder trained against a small vision tower.

The vision tower stays in the work folder. Stage `vae` uses it as its perceptual distance, in the role that VGG has in
LPIPS; it shares neither weights nor architecture with the metric's classifier.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewstep.metrics.features import dequantise
from fewstep.teachers.fashion_build.captions import (
    BOS,
    CLASS_NAMES,
    EOS,
    MAX_TOKENS,
    TEMPLATES,
    all_captions,
    build_tokenizer,
)
from fewstep.teachers.fashion_build.data import load_pictures
from fewstep.teachers.fashion_build.loop import Plan, read_notes, train, write_json, write_note, write_tensors

log = logging.getLogger(__name__)

TEXT_PLAN = Plan(name="text", minutes=2.5, peak_lr=2e-3, warmup=0.1, weight_decay=0.05, ema=0.998, seed=2)
BATCH = 250
WIDTH = 64


class VisionTower(nn.Module):
    """A small picture encoder: three convolutions (24-48-96, GELU, average pooling) and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(1, 24, 5, 2, 2), nn.Conv2d(24, 48, 3, 1, 1), nn.Conv2d(48, 96, 3, 1, 1)])
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in (24, 48, 96))
        self.hidden = nn.Linear(96 * 16, 128)
        self.out = nn.Linear(128, WIDTH)

    def levels(self, images: Tensor) -> list[Tensor]:
        """The four activations used as a perceptual distance.

        images: [B, 1, 32, 32] in [-1, 1].  Returns [B, 24, 16, 16], [B, 48, 8, 8], [B, 96, 4, 4], [B, 128].
        """
        found = []
        hidden = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            hidden = F.gelu(norm(conv(hidden)))
            hidden = F.avg_pool2d(hidden, 2) if index else hidden
            found.append(hidden)
        return [*found, self.hidden(hidden.flatten(1))]

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 1, 32, 32] in [-1, 1].  Returns embeddings [B, 64], not normalised."""
        return self.out(F.gelu(self.levels(images)[-1]))


class Pair(nn.Module):
    """Text encoder and vision tower with CLIP's shared space and learned temperature [CLIP: arXiv:2103.00020]."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        ids = tokenizer.get_vocab()
        self.text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=4 * WIDTH,
                projection_dim=WIDTH,
                num_hidden_layers=3,
                num_attention_heads=4,
                max_position_embeddings=MAX_TOKENS,
                pad_token_id=ids[BOS],
                bos_token_id=ids[BOS],
                eos_token_id=ids[EOS],
            )
        )
        self.text_projection = nn.Linear(WIDTH, WIDTH, bias=False)
        self.vision = VisionTower()
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosines.  images: [B, 1, 32, 32] in [-1, 1].  tokens: [T, 16] int64.  Returns [B, T]."""
        seen = F.normalize(self.vision(images), dim=1)
        read = F.normalize(self.text_projection(self.text(input_ids=tokens).pooler_output), dim=1)
        return self.log_scale.exp().clamp(max=100) * seen @ read.T


def contrastive_loss(scores: Tensor, positive: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy with every pair of the same class a positive, each row's mass shared equally.

    scores: [B, T].  positive: [B, T] bool.  With ten classes most of CLIP's "negatives" would be false ones.
    """
    rows = positive.any(1)
    columns = positive.any(0)
    to_text = -(F.log_softmax(scores, 1) * positive).sum(1)[rows] / positive.sum(1)[rows]
    to_image = -(F.log_softmax(scores, 0) * positive).sum(0)[columns] / positive.sum(0)[columns]
    return (to_text.mean() + to_image.mean()) / 2


def caption_tokens(tokenizer: CLIPTokenizer) -> tuple[Tensor, Tensor]:
    """Token ids [100, 16] and class labels [100] of `all_captions`, padded as the pipeline pads them."""
    ids = tokenizer(all_captions(), padding="max_length", max_length=MAX_TOKENS, return_tensors="pt").input_ids
    return ids, torch.arange(len(CLASS_NAMES)).repeat_interleave(len(TEMPLATES))


def build_text(data: Path, out: Path, work: Path, minutes: float | None = None) -> None:
    """Write tokenizer/ and text_encoder/ of the pipeline folder and the vision tower into the work folder."""
    if "text" in read_notes(out):
        log.info("text: finished before")
        return
    tokenizer = build_tokenizer()
    tokens, classes = caption_tokens(tokenizer)
    pictures = load_pictures("train", data)

    def loss_of(model: Pair, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(pictures.images), (BATCH,), generator=generator)
        scores = model(dequantise(pictures.images[index]), tokens)
        return contrastive_loss(scores, pictures.labels[index][:, None] == classes[None])

    torch.manual_seed(TEXT_PLAN.seed)
    plan = TEXT_PLAN if minutes is None else replace(TEXT_PLAN, minutes=minutes)
    pair = train(plan, Pair(tokenizer), loss_of, work)
    folder = out / "fashion-dit"
    tokenizer.save_pretrained(folder / "tokenizer")
    save_text_encoder(pair.text, folder / "text_encoder")
    write_tensors(work / "vision.safetensors", pair.vision.state_dict())
    write_note(out, work, plan, {"zero_shot_accuracy": zero_shot_accuracy(pair, data, tokens, classes)})


def save_text_encoder(encoder: CLIPTextModel, folder: Path) -> None:
    """Store in fp16 but ask for fp32 in config.json: transformers would load fp16 beside diffusers' fp32 parts."""
    encoder.half().save_pretrained(folder)
    encoder.float()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json(folder / "config.json", config | {"dtype": "float32"})


@torch.no_grad()
def zero_shot_accuracy(pair: Pair, data: Path, tokens: Tensor, classes: Tensor) -> float:
    """Share of the 10,000 test images whose nearest caption is one of their class."""
    test_set = load_pictures("t10k", data)
    nearest = torch.cat([pair(dequantise(part), tokens).argmax(1) for part in test_set.images.split(500)])
    return float((classes[nearest] == test_set.labels).double().mean())


def load_vision_tower(work: Path) -> VisionTower:
    """The trained vision tower, frozen, in eval mode."""
    tower = VisionTower()
    tower.load_state_dict(load_file(work / "vision.safetensors"))
    return tower.eval().requires_grad_(False)
