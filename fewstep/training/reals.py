"""Real samples for the GAN: latents under their own captions, as a pure function of the global sample index."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from fewstep.rng import key
from fewstep.teachers.base import Codec, PromptEncoder, Reals
from fewstep.types import Condition, Real

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "metadata.jsonl"
PIECE = 16
"""Pictures encoded at a time."""


class RealData:
    """Latents of real samples and their captions' conditions, shuffled anew each epoch.

    Sample i of the run gets row permutation(seed, i // N)[i % N], whatever the number of processes.  The order is
    independent of the prompts'.
    """

    def __init__(self, reals: Reals, encode: PromptEncoder, seed: int) -> None:
        self.seed = seed
        self._latents = reals.latents
        known = {caption: row for row, caption in enumerate(dict.fromkeys(reals.captions))}
        self._rows = torch.tensor([known[caption] for caption in reals.captions])
        self._conditions = encode(tuple(known))
        self._epoch = lru_cache(maxsize=2)(self._permutation)
        stored = self._latents.contiguous().view(torch.uint8).numpy().tobytes()
        self.digest = sha256(stored + "\n".join(reals.captions).encode()).hexdigest()

    def _permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(key(self.seed, "reals", epoch))
        return torch.randperm(len(self._latents), generator=generator)

    def batch(self, sample_ids: Sequence[int], device: torch.device | str = "cpu") -> Real:
        """The real samples of these global sample indices, float32."""
        n = len(self._latents)
        rows = torch.stack([self._epoch(i // n)[i % n] for i in sample_ids])
        captions = self._rows[rows]
        cond = Condition({k: v[captions] for k, v in self._conditions.tensors.items()}, self._conditions.null)
        return Real(self._latents[rows].float().to(device), cond.to(device))


def captioned_pictures(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder with their captions, sorted by name.

    Captions come from metadata.jsonl ({"file_name": ..., "text": ...}, as `datasets` has it), else from NAME.txt beside
    NAME.png.  Raises FileNotFoundError or ValueError that names the first picture without one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; --data takes a folder of pictures")
    listed = folder / CAPTIONS
    if listed.is_file():
        return sorted((folder / row["file_name"], row["text"]) for row in _rows(listed))
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    return [(path, _caption_beside(path)) for path in found]


def _rows(listed: Path) -> Iterator[dict[str, str]]:
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{listed}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not {"file_name", "text"} <= row.keys():
            raise ValueError(f'{listed}, line {number}: it must hold "file_name" and "text"')
        yield row


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no caption: write {text.name} beside it, or a {CAPTIONS} in the folder")
    return text.read_text(encoding="utf-8").strip()


def encoded(
    folder: Path, codec: Codec, shape: Sequence[int], source: str, done: Callable[[int], None] = lambda count: None
) -> Reals:
    """The pictures of a folder as latents, encoded once and kept in the user's cache for the same teacher.

    shape: one latent's.  source: names the teacher whose codec this is.  done: called with the pictures finished.
    Pictures are resized to cover the teacher's size and cut at the centre.  The cache is $FEWSTEP_CACHE or
    ~/.cache/fewstep.
    """
    from safetensors.torch import load_file

    from fewstep.training.checkpoint import write_tensors

    pictures = captioned_pictures(folder)
    captions = tuple(caption for _, caption in pictures)
    cached = cache_folder() / "latents" / f"{_fingerprint(pictures, source, shape)}.safetensors"
    if cached.is_file():
        done(len(pictures))
        return Reals(load_file(cached)["latents"], captions)
    parts = []
    for start in range(0, len(pictures), PIECE):
        paths = [path for path, _ in pictures[start : start + PIECE]]
        parts.append(codec.encode(torch.stack([_picture(path, codec.image_shape(shape)) for path in paths])).cpu())
        done(len(paths))
    latents = torch.cat(parts).half()
    write_tensors(cached, {"latents": latents})
    return Reals(latents, captions)


def cache_folder() -> Path:
    """Where encoded data are kept."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")


def _fingerprint(pictures: Sequence[tuple[Path, str]], source: str, shape: Sequence[int]) -> str:
    """Changes with every file's name, size and time, and with the teacher."""
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path, _ in pictures]
    return sha256(json.dumps([source, list(shape), stats]).encode()).hexdigest()


def _picture(path: Path, shape: tuple[int, int, int]) -> Tensor:
    """One picture as [C, H, W] in [-1, 1], resized to cover H x W and cut at the centre."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(path) as opened:
            image = ImageOps.fit(
                opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS
            )
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32)) / 127.5 - 1
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
