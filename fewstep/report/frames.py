"""Preview grids small enough to stand in a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from fewstep.report.record import Record

FRAMES, SIDE, QUALITY = 24, 1400, 85
"""Of each run: grids at the most, pixels of the longer side at the most, and WebP's quality."""


class Frame(NamedTuple):
    """A grid as a data URI, and the iteration that it is of."""

    iteration: int
    uri: str
    width: int
    height: int


def frames(record: Record) -> list[Frame]:
    """The run's grids, spread evenly over it if they are many; the first, the last and the best are among them."""
    best = record.best[0] if record.best is not None else None
    return [
        _frame(iteration, path, path.stat().st_mtime_ns)
        for iteration in _chosen(record.previews, best)
        for path in (record.previews[iteration],)
    ]


def _chosen(previews: Mapping[int, Path], best: int | None) -> Sequence[int]:
    have = sorted(previews)
    if len(have) <= FRAMES:
        return have
    spread = {have[round(i * (len(have) - 1) / (FRAMES - 2))] for i in range(FRAMES - 1)}
    if best is not None and best in previews:
        spread.add(best)
    return sorted(spread)


@lru_cache(maxsize=1024)  # a run that goes on is looked at again and again
def _frame(iteration: int, path: Path, _changed: int) -> Frame:
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    held = io.BytesIO()
    image.save(held, "WEBP", quality=QUALITY, method=4)
    uri = "data:image/webp;base64," + base64.b64encode(held.getvalue()).decode("ascii")
    return Frame(iteration, uri, image.width, image.height)
