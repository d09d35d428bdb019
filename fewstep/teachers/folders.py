"""Pipeline folders before and after loading: what is refused, so that a damaged one is named and no code is run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

BLOCK = 4096
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def check_folder(folder: Path) -> str:
    """The pipeline class of a diffusers folder in safetensors.  Raises ValueError for others, before loading them."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise ValueError(f"{folder} is no diffusers pipeline folder: model_index.json is missing")
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{index} does not parse: {error}") from error
    if not isinstance(parts, dict) or "_class_name" not in parts:
        raise ValueError(f"{index} names no pipeline class (_class_name)")
    pickles = sorted(p for p in folder.rglob("*") if p.suffix in PICKLES)
    if pickles:
        raise ValueError(
            f"{folder} holds pickled weights ({pickles[0].relative_to(folder)}), which can run code when loaded; save "
            "the pipeline with safe_serialization=True and remove them"
        )
    return str(parts["_class_name"])


def check_weights(pipe: Any, source: str) -> None:
    """Raises ValueError if a weight of any part is missing or not finite: training would say so later, or never.

    The libraries leave a missing tensor without memory, or fill it with random numbers; the latter is seen by counting
    what a local folder holds.
    """
    bad = []
    for part, network in pipe.components.items():
        if isinstance(network, nn.Module):
            named = list(network.named_parameters())
            bad += [f"{part}.{name}" for name, p in named if p.is_meta or not p.isfinite().all()]
            stored, needed = _numbers_in(Path(source) / part), sum(p.numel() for _, p in named)
            if stored < needed and Path(source).is_dir():
                raise ValueError(f"{source!r} has missing weights: {part} needs {needed} numbers and holds {stored}")
    if bad:
        more = ", ..." if len(bad) > 3 else ""
        raise ValueError(f"{source!r} holds missing or non-finite weights ({', '.join(bad[:3])}{more})")


def _numbers_in(folder: Path) -> int:
    """How many numbers the safetensors files of a folder hold, by their headers."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def contents(folder: Path, parts: Sequence[str]) -> str:
    """Tells apart the named parts of pipeline folders, such as "text_encoder" and its like (text_encoder_2).

    The pipeline's class and settings, every small file, and of each file of weights its size and 256 blocks: enough
    for any training, and cheap.  Where the folder lies does not count.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in index.items() if name == "_class_name" or not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    files = (p for part in folder.iterdir() if part.name.startswith(tuple(parts)) for p in part.rglob("*"))
    for path in sorted(path for path in files if path.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}".encode())
        digest.update(sampled(path))
    return digest.hexdigest()


def sampled(path: Path) -> bytes:
    """Blocks of a file, all of a small one and 256 of a large one."""
    size, blocks = path.stat().st_size, []
    with path.open("rb") as file:
        for start in range(0, size, max(BLOCK, size // 256)):
            file.seek(start)
            blocks.append(file.read(BLOCK))
    return b"".join(blocks)


@contextmanager
def quiet() -> Iterator[None]:
    """No bars, and no word that the text encoder is none of CogView4's own; what matters is checked after loading."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    verbosity, bars = ours.get_verbosity(), (ours.is_progress_bar_enabled(), theirs.is_progress_bar_enabled())
    ours.set_verbosity_error()
    ours.disable_progress_bar()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        ours.set_verbosity(verbosity)
        for logging, enabled in zip((ours, theirs), bars, strict=True):
            if enabled:
                logging.enable_progress_bar()
