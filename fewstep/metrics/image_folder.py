"""Pictures of a folder as a protocol takes them: in the order of their names, cropped, resized, as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from torch import Tensor

from fewstep.metrics.protocols import PATCH, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def image_files(folder: Path, protocol: Protocol) -> list[Path]:
    """The pictures of a folder, or of the subfolders that a protocol's categories name, by name.

    Raises FileNotFoundError or ValueError if there is none, or none of a category.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder of images at {folder}")
    found = []
    for part in [folder / name for name in protocol.categories] or [folder]:
        files = sorted(path for path in part.glob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            inside = f"; {protocol.name} wants the subfolders {', '.join(protocol.categories)}"
            raise ValueError(
                f"no image in {part}: {', '.join(SUFFIXES)} are read{inside if protocol.categories else ''}"
            )
        found += files
    return found


def check_sizes(files: Sequence[Path], protocol: Protocol) -> None:
    """Read all headers.  Raises ValueError for what is no picture or of a size that the protocol does not take."""
    first: tuple[Path, tuple[int, int]] | None = None
    for path in files:
        with _opened(path) as image:
            size = image.size
        check_size(size, str(path), protocol)
        first = first or (path, size)
        if protocol.crop == "none" and size != first[1]:
            raise ValueError(
                f"{path} is {size[0]}x{size[1]} and {first[0]} is {first[1][0]}x{first[1][1]}: {protocol.name} crops "
                "nothing, so all images must have one size."
            )


def check_size(size: tuple[int, int], name: str, protocol: Protocol) -> None:
    """Raises ValueError if a protocol does not take a picture of this width and height."""
    said = f"{name} is {size[0]}x{size[1]}"
    if protocol.crop == "none" and protocol.size and size != (protocol.size, protocol.size):
        raise ValueError(f"{said}: {protocol.name} takes {protocol.size}x{protocol.size} and resizes nothing.")
    if protocol.crop == "patch" and min(size) < PATCH:
        raise ValueError(f"{said}: {protocol.name} takes the middle {PATCH}x{PATCH}, so it must be at least that.")


def batches(files: Sequence[Path], protocol: Protocol, channels: int, batch_size: int) -> Iterator[Tensor]:
    """The pictures as [B, channels, H, W] uint8.  Raises ValueError that names a picture that is damaged."""
    for start in range(0, len(files), batch_size):
        rows = []
        for path in files[start : start + batch_size]:
            with _opened(path) as image:
                try:
                    rows.append(prepared(image, protocol, channels))
                except (OSError, SyntaxError) as error:  # PIL's of files that are cut off or damaged
                    raise ValueError(f"{path} is damaged: {error}") from error
        yield torch.stack(rows)


def prepared(image: Image, protocol: Protocol, channels: int) -> Tensor:
    """One picture as the protocol's crop and resize leave it: [channels, H, W] uint8, grey or red, green and blue."""
    from PIL.Image import Resampling

    image = image.convert("L" if channels == 1 else "RGB")
    if protocol.crop != "none":
        edge = PATCH if protocol.crop == "patch" else min(image.size)
        gaps = [(length - edge) / 2 for length in image.size]
        left, top = (int(gap) if protocol.crop == "square-floor" else round(gap) for gap in gaps)
        image = image.crop((left, top, left + edge, top + edge))
    if protocol.size and image.size != (protocol.size, protocol.size):
        image = image.resize((protocol.size, protocol.size), Resampling[protocol.filter.upper()])
    pixels = torch.from_numpy(numpy.array(image))
    return pixels[None] if channels == 1 else pixels.permute(2, 0, 1)


def prepared_tensor(images: Tensor, protocol: Protocol, channels: int) -> Tensor:
    """Bytes that never were files, as `prepared` leaves pictures.  images: [N, 1 or 3, H, W] uint8."""
    from PIL import Image

    rows = []
    for pixels in images:
        array = pixels.permute(1, 2, 0).numpy()
        image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
        check_size(image.size, "a sample", protocol)
        rows.append(prepared(image, protocol, channels))
    return torch.stack(rows)


def _opened(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is no image that can be read: {error}") from error
