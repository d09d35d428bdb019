"""Captioned pictures to latents, once: in shards in the user's cache, from which training reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fewstep.bar import bar
from fewstep.sampling import Advance
from fewstep.teachers.base import Codec, Reals, Teacher
from fewstep.teachers.folders import contents
from fewstep.training.cache import Share, Store, stamps
from fewstep.training.embeddings import MEMORY
from fewstep.training.prompts import kept
from fewstep.training.sources import Picture, captioned_pictures, pictures_in, tar_shards

PIECE = 16
"""Pictures encoded at a time."""


class StoredLatents:
    """Latents on the disk, [N, *shape], of which a batch's rows are read."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __len__(self) -> int:
        return self._store.shards.count

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The rows [B] long, in their order."""
        return torch.cat([self._store.row(row)["latents"] for row in rows.tolist()])

    def checksums(self) -> Iterator[bytes]:
        """Those of all rows."""
        return self._store.checksums()


def captions_of(path: Path) -> Sequence[str]:
    """The captions of the pictures of tar shards or of a folder, in their order.

    Raises FileNotFoundError or ValueError if there are no pictures, or one has no caption.
    """
    shards = tar_shards(path)
    if not shards:
        return tuple(caption for _, caption in captioned_pictures(path))
    captions = kept((picture.caption for picture in pictures_in(path)), shards, "captions")
    if not captions:
        raise ValueError(f"{path} holds no pictures; tar shards hold KEY.jpg, .png or .webp, each with KEY.txt")
    return captions


def encoded(
    path: Path,
    captions: Sequence[str],
    codec: Codec,
    shape: Sequence[int],
    card: Mapping[str, Any],
    *,
    note: Mapping[str, Any] | None = None,
    console: Console | None = None,
    share: Share | None = None,
    device: torch.device | str = "cpu",
) -> Reals:
    """The pictures at `path` as latents, float16, encoded once and kept in the user's cache for the same codec.

    captions: `captions_of` them.  shape: one latent's.  card: what tells the codec from others; see `card_of`.
    device: where they are encoded.
    Pictures are resized to cover the teacher's size and cut at the centre.  More than MEMORY bytes stay on the disk.
    """
    share, size = share or Share(), codec.image_shape(shape)
    files = tar_shards(path) or [file for file, _ in captioned_pictures(path)]
    store = Store("latents", {"codec": card, "shape": list(shape), "files": stamps(files)}, note)
    row = {"latents": torch.empty((1, *shape), dtype=torch.float16)}
    index = store.index() or store.planned(row, len(captions))
    store.begin(index)

    def encode(images: Tensor) -> Tensor:
        return codec.encode(images.to(device)).half().cpu()

    with share.together(), bar("encoding pictures", store.total(share), console) as done:
        _fill(store, path, encode, size, share, done)
    # Nothing is left, unless other processes have caches of their own.
    _fill(store, path, encode, size, Share(), lambda count: None)
    latents = StoredLatents(store)
    few = index["row_bytes"] * len(captions) <= MEMORY
    return Reals(latents[torch.arange(len(captions))] if few else latents, captions)


def card_of(teacher: Teacher) -> dict[str, Any]:
    """What tells the latents of this teacher's codec from another's: its content, or the teacher's name and options."""
    if teacher.folder is not None:
        return {"weights": contents(teacher.folder, ("vae",))}
    return {"source": teacher.card.source, "revision": teacher.card.revision, "options": teacher.options}


def _fill(
    store: Store,
    path: Path,
    encode: Callable[[Tensor], Tensor],
    size: tuple[int, int, int],
    share: Share,
    done: Advance,
) -> None:
    """Encode what is missing of the shards, in one walk through the pictures; the others are passed over unread."""
    pictures, at = pictures_in(path), 0
    for rows in store.missing(share, done):
        for _ in islice(pictures, rows.start - at):
            pass
        at, parts = rows.stop, []
        for start in range(rows.start, rows.stop, PIECE):
            # Each is read before the next is asked for, which may be in another archive.
            images = [_pixels(picture, size) for picture in islice(pictures, min(PIECE, rows.stop - start))]
            parts.append(encode(torch.stack(images)))
            done(len(images))
        store.write(rows.start, {"latents": _finite(torch.cat(parts), path)})


def _finite(latents: Tensor, path: Path) -> Tensor:
    if not latents.isfinite().all():
        raise ValueError(f"the codec gave non-finite latents of {path}; its weights are damaged or overflow in float16")
    return latents


def _pixels(picture: Picture, shape: tuple[int, int, int]) -> Tensor:
    """One picture as [C, H, W] in [-1, 1], resized to cover H x W and cut at the centre."""
    import numpy
    from PIL import Image, ImageOps, UnidentifiedImageError

    channels, height, width = shape
    try:
        with Image.open(BytesIO(picture.read())) as opened:
            image = ImageOps.fit(
                opened.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS
            )
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"{picture.name} cannot be read as a picture: {error}") from error
    pixels = torch.from_numpy(numpy.asarray(image, dtype=numpy.float32)) / 127.5 - 1
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)
