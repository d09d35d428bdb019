"""CLIP score: how well pictures fit their prompts, by any CLIP stored as a transformers folder with safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.features import file_sha256, quantise

FASHION_CLIP = Path(__file__).parents[1] / "teachers" / "weights" / "fashion-clip"
SMALLEST_ACCURACY = 0.85
WEIGHTS = "model.safetensors"
RESAMPLE = {2: "bilinear", 3: "bicubic"}
"""PIL's numbers of what a processor resizes with, as torch calls it."""


class Scorer(Protocol):
    """A CLIP.  figure, factor: what `factor` times its mean cosine is called.  protocol: what fixes its scores."""

    @property
    def figure(self) -> str: ...

    @property
    def factor(self) -> float: ...

    @property
    def protocol(self) -> dict[str, Any]: ...

    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """[N, C, H, W] uint8 and N prompts -> [N] float64, on the CPU."""
        ...


@dataclass(frozen=True)
class ClipScorer:
    """A CLIPModel in eval mode with its tokenizer, its image processor, and what fixes its scores (`protocol`)."""

    model: Any
    tokenizer: Any
    processor: Any
    protocol: dict[str, Any]
    figure: str = "clip_score"
    factor: float = 100.0

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """Unit embeddings of pictures, always after `quantise`.

        images: [B, 1 or 3, H, W], float in [-1, 1] or uint8.  Returns [B, D] float32.  Grey pictures are repeated where
        the vision tower wants three channels; coloured ones for a grey tower and non-finite ones raise ValueError.
        """
        channels = self.model.config.vision_config.num_channels
        if images.ndim != 4 or images.shape[1] not in (1, channels):
            raise ValueError(f"images must be [B, {channels}, H, W] or grey [B, 1, H, W], got {tuple(images.shape)}.")
        if not bool(images.isfinite().all()):
            raise ValueError("images hold numbers that are not finite; they have no CLIP score.")
        pictures = quantise(images).cpu().expand(-1, channels, -1, -1)
        pixels = self.processor(list(pictures.numpy()), return_tensors="pt", input_data_format="channels_first")
        seen = self.model.get_image_features(pixel_values=pixels["pixel_values"].to(self.model.device))
        return F.normalize(seen.pooler_output.float(), dim=1)

    def see(self, images: Tensor) -> Tensor:
        """`embed_images` with a gradient for the pictures: float, resized by torch and not by PIL, never quantised.

        images: [B, 1 or 3, H, W], about in [-1, 1].  Returns [B, D] float32 on their device.
        """
        model, processor = self.model.to(images.device), self.processor
        pixels = images.float().expand(-1, model.config.vision_config.num_channels, -1, -1)
        pixels = _resized(pixels, dict(processor.size), int(processor.resample))
        if processor.do_center_crop:
            pixels = _cropped(pixels, processor.crop_size["height"], processor.crop_size["width"])
        mean, std = (
            torch.tensor(v, device=pixels.device)[:, None, None] for v in (processor.image_mean, processor.image_std)
        )
        seen = model.get_image_features(pixel_values=((pixels + 1) / 2 - mean) / std)
        return F.normalize(seen.pooler_output.float(), dim=1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings of B texts, cut by the tokenizer to the text tower's length: [B, D] float32.

        Cutting ids instead would lose the end token, where the tower pools: all long texts would become one. Texts are
        padded to the full length and no mask is given, as CLIP was trained and as the embedded teacher encodes.
        """
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).input_ids
        if not bool((tokens == self.tokenizer.eos_token_id).any(1).all()):
            raise ValueError(f"the tokenizer gives no end token {self.tokenizer.eos_token!r}, where a CLIP text pools.")
        read = self.model.get_text_features(input_ids=tokens.to(self.model.device))
        return F.normalize(read.pooler_output.float(), dim=1)

    def cosines(self, images: Tensor, prompts: Sequence[str], *, batch_size: int = 500) -> Tensor:
        """Cosine of every picture with its own prompt.

        images: [N, C, H, W], as for `embed_images`.  prompts: N.  Returns [N] float64 in [-1, 1], on the CPU.  A text
        is encoded once however often it occurs.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not go with {len(prompts)} prompts; one prompt per image.")
        if not prompts:
            return torch.zeros(0, dtype=torch.float64)
        rows = {text: row for row, text in enumerate(dict.fromkeys(prompts))}
        texts = list(rows)
        read = torch.cat([self.embed_texts(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)])
        seen = torch.cat([self.embed_images(part) for part in images.split(batch_size)])
        own = read[[rows[text] for text in prompts]]
        return (seen.double() * own.double()).sum(1).cpu()


def clip_score(scorer: ClipScorer, images: Tensor, prompts: Sequence[str]) -> float:
    """Mean over pictures of 100 cos(image, prompt), in [-100, 100].

    Not clamped at zero: the CLIPScore of arXiv:2104.08718, 2.5 max(cos, 0), is another quantity and hides how far a bad
    picture is from its prompt.  images: [N, C, H, W] in [-1, 1] or uint8.  prompts: N >= 1.
    """
    if not prompts:
        raise ValueError("a CLIP score needs at least one image.")
    return 100 * float(scorer.cosines(images, prompts).mean())


def agreement(scorer: ClipScorer, known: int = 10_000) -> Callable[[Tensor, Sequence[str]], Tensor]:
    """(pictures, prompts) -> cosines [B] with a gradient for the pictures; the last `known` prompts are remembered."""
    read = lru_cache(known)(lambda prompt: scorer.embed_texts([prompt])[0])

    def cosines(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen = scorer.see(images)
        return (seen * torch.stack([read(prompt) for prompt in prompts]).to(seen.device)).sum(1)

    return cosines


def load_clip_scorer(folder: Path = FASHION_CLIP) -> ClipScorer:
    """A CLIPModel folder (model.safetensors, CLIPTokenizer, CLIPImageProcessor), held against its card.json.

    The packaged model must have a card, a foreign one need not.  Raises FileNotFoundError for a missing file,
    ValueError for a card of other weights or for one whose zero-shot accuracy is below 0.85: what such a model prefers
    says little about the prompt.
    """
    scorer = read_clip(folder)
    return replace(scorer, protocol=scorer.protocol | {"clip_zero_shot_accuracy": _accuracy(folder)})


def read_clip(folder: Path, *, device: torch.device | str = "cpu") -> ClipScorer:
    """The model of a folder in float32, without gradients. Its card is not looked at: this also serves to write it."""
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(
            f"no CLIP weights at {weights}; the packaged model is built by "
            "`python -m fewstep.teachers.fashion_build --stage clip`, any other must be stored as safetensors."
        )
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model: Any = CLIPModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
    tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    protocol = {"clip_sha256": file_sha256(weights)} | _protocol_of(processor)
    model.eval().requires_grad_(False).to(device)
    return ClipScorer(model, tokenizer, processor, protocol)


def _resized(pixels: Tensor, size: dict[str, int], resample: int) -> Tensor:
    """To the processor's size: height and width, or the shorter edge."""
    height, width = pixels.shape[2:]
    if edge := size.get("shortest_edge"):
        target = (edge, edge * width // height) if height <= width else (edge * height // width, edge)
    else:
        target = size["height"], size["width"]
    if target == (height, width):
        return pixels
    return F.interpolate(pixels, target, mode=RESAMPLE[resample], antialias=True, align_corners=False)


def _cropped(pixels: Tensor, height: int, width: int) -> Tensor:
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    return pixels[:, :, top : top + height, left : left + width]


def _accuracy(folder: Path) -> float | None:
    """The zero-shot accuracy on the card, refused where it is too low or belongs to other weights; None without one."""
    path = folder / "card.json"
    if not path.is_file() and folder != FASHION_CLIP:
        return None
    card = json.loads(path.read_text(encoding="utf-8"))
    if card["sha256"] != file_sha256(folder / WEIGHTS):
        raise ValueError(f"{path} describes other weights than the {WEIGHTS} beside it; they must be built together.")
    accuracy = float(card["zero_shot_accuracy"])
    if not accuracy >= SMALLEST_ACCURACY:
        raise ValueError(
            f"the CLIP in {folder} has a zero-shot accuracy of {accuracy:g}, below {SMALLEST_ACCURACY:g}: its scores "
            "are no measure. Train it longer, or name another CLIP folder."
        )
    return accuracy


def _protocol_of(processor: Any) -> dict[str, Any]:
    """How pictures reach the vision tower: bytes, then PIL's resize and crop, then the normalisation."""
    return {
        "clip_score": "100 cos, unclamped, mean over images; texts cut by the tokenizer",
        "clip_resize": f"PIL, resample {int(processor.resample)}, size {dict(processor.size)}",
        "clip_crop": dict(processor.crop_size) if processor.do_center_crop else None,
        "clip_normalisation": {"mean": list(processor.image_mean), "std": list(processor.image_std)},
    }
