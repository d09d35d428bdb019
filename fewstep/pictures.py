"""Pictures for people: image grids and point clouds as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from fewstep.metrics.features import quantise

MARGIN = 4
INK, PAPER, LINE = (32, 32, 32), (255, 255, 255), (225, 225, 225)


def picture(image: Tensor, scale: int = 1) -> Image.Image:
    """One image [C, H, W] in [-1, 1], C = 1 or 3, enlarged by whole pixels."""
    pixels = quantise(image).permute(1, 2, 0).numpy()
    made = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels[..., :3])
    return made.resize((made.width * scale, made.height * scale), Image.Resampling.NEAREST)


def scatter(points: Tensor, size: int = 256, extent: float | None = None) -> Image.Image:
    """A cloud of points [N, D]; the first two coordinates are drawn (one coordinate: over its rank).

    extent: half of the side in data units; by default all points fit.
    """
    points = points.flatten(1).float()
    if points.shape[1] == 1:
        points = torch.cat([points, torch.linspace(-1, 1, len(points))[:, None] * points.abs().max()], 1)
    extent = extent or float(points[:, :2].abs().max()) * 1.1 or 1.0
    canvas = Image.new("RGB", (size, size), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.line([(0, size // 2), (size, size // 2)], fill=LINE)
    draw.line([(size // 2, 0), (size // 2, size)], fill=LINE)
    for x, y in points[:, :2].tolist():
        column, row = (x / extent + 1) / 2 * size, (1 - y / extent) / 2 * size
        draw.ellipse([column - 1, row - 1, column + 1, row + 1], fill=(40, 90, 180))
    return canvas


def panel(images: Tensor, columns: int, *, scale: int = 2, extent: float | None = None) -> Image.Image:
    """One picture of many samples: images [N, C, H, W] in rows of `columns`, or points [N, D] as one cloud.

    scale: of small images; none is enlarged beyond 512 pixels.
    """
    if images.ndim < 4:
        return scatter(images, extent=extent)
    scale = max(1, min(scale, 512 // images.shape[-1]))
    tiles = [picture(image, scale) for image in images]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * (width + 1) - 1, rows * (height + 1) - 1), PAPER)
    for i, tile in enumerate(tiles):
        canvas.paste(tile, ((i % columns) * (width + 1), (i // columns) * (height + 1)))
    return canvas


def side_by_side(panels: Sequence[tuple[str, Image.Image]], rows: Sequence[str] = ()) -> Image.Image:
    """Titled panels beside each other, with an optional label before each row of tiles."""
    title, rows = 16, [" ".join(label.split()) for label in rows]  # a prompt may have several lines
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max((int(probe.textlength(label)) for label in rows), default=0) + (2 * MARGIN if rows else 0)
    height = max(image.height for _, image in panels)
    width = left + sum(max(image.width, int(probe.textlength(name))) + 2 * MARGIN for name, image in panels)
    canvas = Image.new("RGB", (width, title + height + MARGIN), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, label in enumerate(rows):
        draw.text((MARGIN, title + int((i + 0.5) * height / len(rows)) - 6), label, fill=INK)
    x = left
    for name, image in panels:
        draw.text((x + MARGIN, 2), name, fill=INK)
        canvas.paste(image, (x + MARGIN, title))
        x += max(image.width, int(probe.textlength(name))) + 2 * MARGIN
    return canvas


def save(image: Image.Image, path: Path) -> Path:
    """Write a PNG, making its folder.  Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path
