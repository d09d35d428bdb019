"""Teachers that are diffusers pipelines: a registered name, a local folder or file, or a hub id."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewstep.registry import Registry
from fewstep.teachers import hub
from fewstep.teachers.base import TEACHERS, Teacher
from fewstep.teachers.codecs import PipelineEncoder, TextEncoders
from fewstep.teachers.folders import check_folder, check_weights, quiet
from fewstep.teachers.single import class_of, is_single, unpacked

FAMILIES: Registry[Callable[..., Teacher]] = Registry("pipeline class")
"""Pipeline class name -> a function that makes a Teacher of the loaded pipeline."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of a teacher's weights, by the names that training's precision has, too."""

IN_PIECES = frozenset({"CogView4Pipeline"})
"""Families whose network can be run in pieces, see `models.split`."""

OF_CLASSES = frozenset({"DiTPipeline"})
"""Families that are told a class, and bring all their classes as prompts."""


def load_teacher(name_or_path: str, **options: Any) -> Teacher:
    """A teacher by registered name, local diffusers folder, file of the original layout, or hub id.

    Hub ids use HF_HOME and HF_TOKEN as huggingface_hub does.  Only safetensors are read and no remote code is run.
    Raises LookupError for a name that is none of these, ValueError for a folder or model that cannot be used.
    """
    make = partial(from_pipeline, name_or_path) if is_place(name_or_path) else TEACHERS.get(name_or_path)
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"teacher {name_or_path!r} with options {options}: {error}") from error


def is_place(name_or_path: str) -> bool:
    """Whether this is no registered name but a folder or file, or may be a hub id."""
    return name_or_path not in TEACHERS and (
        Path(name_or_path).exists() or name_or_path.count("/") == 1 or is_single(name_or_path)
    )


def pipeline_class(name_or_path: str, source: str | None = None) -> str | None:
    """The pipeline class of a registered teacher, local folder or file, before any weight is read; None of others.

    source: the option of a published teacher.  Raises ValueError for a folder or file that is none.
    """
    from fewstep.teachers.fashion import WEIGHTS

    embedded = WEIGHTS / name_or_path
    if name_or_path not in TEACHERS or source is not None:
        folder = Path(source or name_or_path)
        if is_single(str(folder)):
            return class_of(folder)
        return check_folder(folder) if folder.is_dir() else None
    if (embedded / "model_index.json").is_file():
        return check_folder(embedded)
    return getattr(TEACHERS.get(name_or_path), "pipeline", None)


def from_pipeline(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "fp32",
    variant: str | None = None,
    family: str | None = None,
    config: str | None = None,
    tiling: bool = False,
    **more: Any,
) -> Teacher:
    """Load a diffusers pipeline folder or hub id, or one file, and hand it to its family.

    revision: the hub's branch, tag or commit.  dtype: fp32, bf16 or fp16, of the network and its text encoders; the
    VAE stays float32, in which none overflows.  variant: of the weights' files, as "fp16".  family: the pipeline class
    that it must have.  config: whose configs go with one file, see `single.unpacked`.  tiling: the VAE works on parts
    of a large picture, one at a time, and blends them: less memory, and not quite the same picture.  more: what its
    family takes, such as the resolution in pixels of a side.
    Raises ValueError for what cannot be loaded, LookupError for a pipeline class of no known family: before its
    weights are fetched.
    """
    if dtype not in DTYPES:
        raise ValueError(f"teacher.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    given = {"revision": revision, "variant": variant, "dtype": None if dtype == "fp32" else dtype, "config": config}
    options = {name: value for name, value in (given | {"tiling": tiling or None} | more).items() if value is not None}
    _effective(source, options)
    local = Path(source).exists()
    found = _class_of(source, revision)
    _known(found, source, family)
    check_options(found, source, more)
    if is_single(source):
        folder = unpacked(Path(source), config)
    else:
        folder = Path(source) if local else hub.fetch(source, revision, variant)
    read = partial(_read, source, folder, DTYPES[dtype], variant)
    pipe = read()
    make = FAMILIES.get(type(pipe).__name__)
    check_weights(pipe, str(folder))
    _check_parts(pipe, source)
    if tiling:
        _tile(pipe, source)
    teacher = make(pipe, source, **more)
    if isinstance(teacher.encode, PipelineEncoder):
        teacher.encode.encoders = TextEncoders(pipe, read)
        teacher = replace(teacher, encoders=teacher.encode.encoders)
    commit = None if local else _commit(folder)
    return replace(teacher, card=replace(teacher.card, revision=commit), folder=folder, options=options)


def check_options(family: str, source: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that this pipeline class does not take."""
    known = [name for name, p in inspect.signature(FAMILIES.get(family)).parameters.items() if p.kind == p.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise ValueError(
                f"teacher.{name}={options[name]!r}: {source!r} is a {family}, which takes no {name}; allowed are "
                f"{', '.join(known) or 'none'}"
            )


def resized(shape: tuple[int, ...], resolution: int | None, vae_scale: int, patch: int) -> tuple[int, ...]:
    """Latents [C, ..., H, W] of square pictures of so many pixels a side; shape itself if that is None.

    vae_scale: pixels per latent.  patch: latents that a side must be a multiple of.
    Raises ValueError, with the nearest size that fits, for another.
    """
    if resolution is None:
        return shape
    step = vae_scale * patch
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(f"resolution {resolution} is not a multiple of this network's {step} pixels; take {near}")
    return (*shape[:-2], resolution // vae_scale, resolution // vae_scale)


def _read(source: str, folder: Path, dtype: torch.dtype, variant: str | None, **components: Any) -> Any:
    """The pipeline of a folder.  components: those that are loaded already."""
    from diffusers import DiffusionPipeline

    dtypes: Any = {"default": dtype, "vae": torch.float32}
    files = {"use_safetensors": True} | ({} if variant is None else {"variant": variant})
    try:
        with quiet():  # after the hub's own bars
            return DiffusionPipeline.from_pretrained(str(folder), dtype=dtypes, **files, **components)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {error}") from error


def _effective(source: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that such a source does not have."""
    kind = "file" if is_single(source) else "folder" if Path(source).exists() else "hub id"
    for name, kinds in {"revision": ["hub id"], "variant": ["hub id", "folder"], "config": ["file"]}.items():
        if name in options and kind not in kinds:
            raise ValueError(
                f"teacher.{name}={options[name]!r} goes with a {' or '.join(kinds)}, and {source!r} is a {kind}; leave "
                "it out"
            )


def _check_parts(pipe: Any, source: str) -> None:
    """Raise ValueError for a UNet beside another model's VAE or text encoders, which would fail in use."""
    if not hasattr(pipe, "unet"):
        return
    unet = pipe.unet.config
    texts = [part for name, part in pipe.components.items() if name.startswith("text_encoder")]
    pairs = {
        "the VAE's latent channels": (pipe.vae.config.latent_channels, unet.out_channels),
        "the text encoders' width": (sum(part.config.hidden_size for part in texts), unet.cross_attention_dim),
    }
    for what, (found, wanted) in pairs.items():
        if found != wanted:
            raise ValueError(
                f"{source!r} has parts of different models: {what} is {found}, and its UNet takes {wanted}; name a "
                "pipeline whose parts belong together"
            )


def _tile(pipe: Any, source: str) -> None:
    """Let the VAE work in tiles.  Raises ValueError for one that cannot."""
    try:
        pipe.vae.enable_tiling()
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(
            f"teacher.tiling=true: the VAE of {source!r}, {type(pipe.vae).__name__}, has no tiles; leave it out"
        ) from error


def _class_of(source: str, revision: str | None) -> str:
    if is_single(source):
        return class_of(Path(source))
    if Path(source).exists():
        return check_folder(Path(source))
    return str(hub.fetch_index(source, revision).get("_class_name"))


def _known(name: str, source: str, wanted: str | None) -> None:
    """Raise LookupError for a class of no family, ValueError if it is not the wanted one."""
    FAMILIES.get(name)
    if wanted is not None and name != wanted:
        raise ValueError(f"{source!r} is a {name}, and this teacher is a {wanted}; name a pipeline of that class")


def _commit(snapshot: Path) -> str | None:
    """huggingface_hub names a snapshot's folder after its commit."""
    return snapshot.name if re.fullmatch("[0-9a-f]{40}", snapshot.name) else None
