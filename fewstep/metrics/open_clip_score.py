"""DMD2's CLIP score: open_clip's ViT-g-14, a prefix before each caption, and the plain mean of cosines."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep.metrics.features import file_sha256
from fewstep.metrics.weights import begins

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
MODEL = "ViT-g-14 laion2b_s12b_b42k"
VISION = {"image_size": 224, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24}
EMBEDDING = 1024
"""Its towers, as open_clip has them by its name."""
PREFIX = "A photo depicts "


@dataclass(frozen=True)
class OpenClipScorer:
    """A CLIP of open_clip in eval mode, float32, and what fixes its scores (`protocol`).

    preprocess: one PIL picture -> [3, H, W], open_clip's for the model.  encode: a text -> its tokens without the two
    special ones, `start` and `end`.  figure: what the mean cosine may be called.
    """

    model: Any
    preprocess: Callable[[Any], Tensor]
    encode: Callable[[str], list[int]]
    start: int
    end: int
    protocol: dict[str, Any]
    figure: str
    factor: float = 1.0

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """[B, length of the text tower] int64: start, prefix, text, end, then zeros.

        A text that is too long loses its last tokens and never the end, where the tower pools.
        """
        length, prefix = self.model.context_length, self.encode(PREFIX)
        rows = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in zip(rows, texts):
            found = [self.start, *prefix, *self.encode(text)][: length - 1] + [self.end]
            row[: len(found)] = torch.tensor(found)
        return rows

    @torch.no_grad()
    def cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosine of every picture with its own prompt: [N] float64 in [-1, 1], on the CPU.

        images: [N, 3, H, W] uint8, cropped and resized as the protocol has it.  prompts: N.
        """
        from PIL import Image

        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images do not go with {len(prompts)} prompts; one prompt per image.")
        device = next(self.model.parameters()).device
        shown = [self.preprocess(Image.fromarray(pixels.permute(1, 2, 0).numpy())) for pixels in images]
        seen = F.normalize(self.model.encode_image(torch.stack(shown).to(device)).float(), dim=1)
        read = F.normalize(self.model.encode_text(self.tokens(prompts).to(device)).float(), dim=1)
        return (seen.double() * read.double()).sum(1).cpu()


def check_open_clip(folder: Path, sha256: str | None = None) -> None:
    """Raises FileNotFoundError if this is no folder of open_clip's, ModuleNotFoundError where that is not installed.

    ValueError for a model of other towers with a hash: that says it is the published one.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"no {name} in {folder}: this protocol's CLIP score is of open_clip's {MODEL}, a folder with {CONFIG} "
                f"and {WEIGHTS}, as it is published; nothing is downloaded."
            )
    if find_spec("open_clip") is None:
        raise ModuleNotFoundError("this protocol's CLIP score needs open_clip: pip install 'fewstep[eval]'")
    if sha256 is not None and not _is_named(folder / CONFIG):
        raise ValueError(
            f"{folder / CONFIG} describes another model than {MODEL}, whose hash is given: name the folder of that "
            "model, or leave the hash out; then the score is called CLIP[open_clip-unverified]"
        )


def _is_named(config: Path) -> bool:
    """Whether open_clip's settings of a model are those of `MODEL`."""
    told = json.loads(config.read_text(encoding="utf-8")).get("model_cfg", {})
    vision, text = (told.get(part, {}).items() for part in ("vision_cfg", "text_cfg"))
    return told.get("embed_dim") == EMBEDDING and VISION.items() <= vision and TEXT.items() <= text


def read_open_clip(folder: Path, *, sha256: str | None = None, device: torch.device | str = "cpu") -> OpenClipScorer:
    """The model of a folder.  sha256: of its weights as their publisher gives it, without which they are unverified.

    Raises as `check_open_clip`, and ValueError for weights of another hash than the given one, or what is no hash.
    """
    check_open_clip(folder, sha256)
    digest = file_sha256(folder / WEIGHTS)
    if sha256 is not None and not begins(digest, [sha256]):
        raise ValueError(f"{folder / WEIGHTS} has the SHA-256 {digest}, which should begin with {sha256}")
    import open_clip  # type: ignore[import-not-found]

    name = f"local-dir:{folder}"  # of several files of weights, it takes the safetensors
    model, _, preprocess = open_clip.create_model_and_transforms(name, precision="fp32", device=device)
    tokenizer = open_clip.get_tokenizer(name)
    protocol = {
        "clip_sha256": digest,
        "clip_verified": sha256 is not None,
        "clip_score": f"mean cosine; {PREFIX!r} before each text, which is cut before its end token",
        "clip_resize": f"square, PIL lanczos to 256, then {preprocess}",
        "open_clip": open_clip.__version__,
    }
    named = "CLIP-ViT-g-14" if sha256 is not None else "CLIP[open_clip-unverified]"
    special = tokenizer.sot_token_id, tokenizer.eot_token_id
    return OpenClipScorer(
        model.eval().requires_grad_(False), preprocess, tokenizer.encode, *special, protocol=protocol, figure=named
    )
