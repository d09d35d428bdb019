"""Teachers without weights: the network from its config alone, on the meta device for plans of what training takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.registry import nearest
from fewstep.teachers.base import TEACHERS, Reals, Teacher, TeacherCard
from fewstep.teachers.fashion import WEIGHTS
from fewstep.teachers.folders import check_folder, quiet
from fewstep.teachers.pipelines import DTYPES, FAMILIES, OF_CLASSES, check_options
from fewstep.teachers.published import PUBLISHED, Published
from fewstep.types import Condition

OF_FILES = frozenset({"source", "config", "revision", "dtype", "variant", "tiling"})
"""Options of how a pipeline's files are read; the others are its family's."""
CLIP_TOKENS = 77
VAE_FRAMES = 4
"""Frames per latent, of any teacher."""
STAGES = ("block_out_channels", "dim_mult", "encoder_block_out_channels")
"""What a VAE's config may call the widths of its stages, each half as large as the one before."""


@dataclass(frozen=True)
class Source:
    """What is known of a pipeline without its weights.

    family: the pipeline's class.  network, scheduler: their configs.  tokens: of an encoded prompt.  vae_scale: pixels
    per latent.  boundary: the time at which a second network of the same config takes over, if there is one.
    """

    family: str
    network: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int
    vae_scale: int
    boundary: float | None = None


def outline(name_or_path: str, *, device: str | torch.device = "meta", **options: Any) -> Teacher:
    """The teacher of this name or folder with shapes and no numbers; its prompts are encoded to zeros.

    options: of `load_teacher`; the hub's (revision, variant) do not matter.
    device: another than meta has a network of random numbers, whose training takes the memory and time of the real one.
    Raises LookupError for a name of which no config is here, ValueError for options and resolutions that do not fit.
    """
    dtype, source = options.get("dtype", "fp32"), _source(name_or_path, options)
    if dtype not in DTYPES:
        raise ValueError(f"teacher.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    more = {name: value for name, value in options.items() if name not in OF_FILES}
    check_options(source.family, name_or_path, more)
    with quiet(), torch.device(device):  # diffusers warns of casts by `to`
        networks = [_built(source.network).to(DTYPES[dtype]).eval() for _ in range(1 if source.boundary is None else 2)]
    made = FAMILIES.get(source.family)(_pipe(source, *networks), name_or_path, **more)
    return replace(
        made,
        encode=_Zeros(made.denoiser.backbone.conditions(source.tokens)),
        card=TeacherCard(name_or_path, name_or_path),
        prompts=("",),
        reals=lambda: Reals(torch.zeros(1, *made.shape), ("",)),
        options=options,
    )


def size_of(name_or_path: str, shape: Sequence[int], **options: Any) -> tuple[int, ...]:
    """(height, width) in pixels of this teacher's samples of `shape`, or (frames, height, width)."""
    scale = _source(name_or_path, options).vae_scale
    frames = [1 + (count - 1) * VAE_FRAMES for count in shape[1:-2]]
    return (*frames, shape[-2] * scale, shape[-1] * scale)


class _Zeros:
    """Encodes every prompt, and the empty one, to zeros of these shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def __call__(self, prompts: Sequence[str]) -> Condition:
        def rows(count: int) -> dict[str, Tensor]:
            return {name: torch.zeros(count, *shape) for name, shape in self._shapes.items()}

        return Condition(rows(len(prompts)), rows(1))


def _source(name: str, options: dict[str, Any]) -> Source:
    registered = TEACHERS.get(name) if name in TEACHERS else None
    if isinstance(registered, Published):
        given = options.get("source")
        if given is not None and Path(given).is_dir():
            return _of_folder(Path(given))
        network, scheduler = registered.architecture(), dict(registered.scheduler)
        known = registered
        return Source(known.pipeline, network, scheduler, known.tokens, known.vae_scale, known.boundary)
    folder = WEIGHTS / name if registered is not None else Path(name)
    if (folder / "model_index.json").is_file():
        return _of_folder(folder)
    known = sorted([p.name for p in PUBLISHED] + [p.parent.name for p in WEIGHTS.glob("*/model_index.json")])
    if registered is not None:
        raise LookupError(f"no architecture of {name!r} is shipped, so it cannot be planned; known: {', '.join(known)}")
    raise LookupError(
        f"no teacher named {name!r} can be planned.{nearest(name, known)} Known: {', '.join(known)}, or a local "
        "diffusers folder, of which the .json files are enough: `hf download ID --include '*.json' --local-dir FOLDER`"
    )


def _of_folder(folder: Path) -> Source:
    """Raises ValueError if a config is missing or does not parse, LookupError for a class of no known family."""
    family = check_folder(folder)
    FAMILIES.get(family)
    part = "transformer" if (folder / "transformer").is_dir() else "unet"
    network, scheduler = _json(folder / part / "config.json"), _json(folder / "scheduler" / "scheduler_config.json")
    vae, tokens = _json(folder / "vae" / "config.json"), 0
    if family not in OF_CLASSES:
        tokenizer = _json(folder / "tokenizer" / "tokenizer_config.json")
        tokens = min(tokenizer.get("model_max_length", CLIP_TOKENS), 1024)
    stages = next(vae[name] for name in STAGES if name in vae)
    boundary = _json(folder / "model_index.json").get("boundary_ratio")
    return Source(family, network, scheduler, tokens, 2 ** (len(stages) - 1), boundary)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"a plan reads {path}, and it is missing; take it from the pipeline's repository")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} does not parse: {error}") from error


def _built(config: dict[str, Any]) -> nn.Module:
    import diffusers

    return getattr(diffusers, config["_class_name"]).from_config(config)


def _pipe(source: Source, network: nn.Module, second: nn.Module | None = None) -> Any:
    """As much of a pipeline as a family's function looks at."""
    import diffusers

    scheduler = getattr(diffusers, source.scheduler["_class_name"]).from_config(source.scheduler)
    return SimpleNamespace(
        unet=network,
        transformer=network,
        transformer_2=second,
        scheduler=scheduler,
        labels={},
        vae=nn.Module(),  # it is off the device in training
        vae_scale_factor=source.vae_scale,
        vae_scale_factor_spatial=source.vae_scale,
        vae_scale_factor_temporal=VAE_FRAMES,
        config=SimpleNamespace(
            force_zeros_for_empty_prompt=True, boundary_ratio=source.boundary, expand_timesteps=False
        ),
    )
