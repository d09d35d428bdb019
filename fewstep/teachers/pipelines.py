"""Teachers that are diffusers pipelines: a registered name, a local folder or a hub id."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fewstep.registry import Registry
from fewstep.teachers.base import TEACHERS, Teacher
from fewstep.teachers.folders import check_folder, check_weights, quiet

FAMILIES: Registry[Callable[..., Teacher]] = Registry("pipeline class")
"""Pipeline class name -> a function that makes a Teacher of the loaded pipeline."""

UNETS = frozenset({"StableDiffusionPipeline"})
"""Families whose network is no chain of blocks."""


def load_teacher(name_or_path: str, **options: Any) -> Teacher:
    """A teacher by registered name, local diffusers folder or hub id.

    Hub ids use HF_HOME and HF_TOKEN as huggingface_hub does.  Only safetensors are read and no remote code is run.
    Raises LookupError for a name that is none of the three, ValueError for a folder or model that cannot be used.
    """
    hub_or_folder = name_or_path not in TEACHERS and (Path(name_or_path).exists() or name_or_path.count("/") == 1)
    make = partial(from_pipeline, name_or_path) if hub_or_folder else TEACHERS.get(name_or_path)
    try:
        return make(**options)
    except TypeError as error:
        raise ValueError(f"teacher {name_or_path!r} with options {options}: {error}") from error


def pipeline_class(name_or_path: str) -> str | None:
    """The pipeline class of an embedded teacher or a local folder, before any weight is read; None of other teachers.

    Raises ValueError for a folder that is none.
    """
    from fewstep.teachers.fashion import WEIGHTS

    embedded = WEIGHTS / name_or_path
    if name_or_path in TEACHERS:
        return check_folder(embedded) if (embedded / "model_index.json").is_file() else None
    return check_folder(Path(name_or_path)) if Path(name_or_path).is_dir() else None


def from_pipeline(source: str, *, revision: str | None = None) -> Teacher:
    """Load a diffusers pipeline folder or hub id (weights in float32) and hand it to its family.

    Raises ValueError for what cannot be loaded, LookupError for a pipeline class of no known family: before its
    weights are fetched.
    """
    options = {} if revision is None else {"revision": revision}
    local = Path(source).exists()
    if local:
        FAMILIES.get(check_folder(Path(source)))
    from diffusers import DiffusionPipeline

    try:
        folder = Path(source) if local else _fetch(source, options)
        with quiet():  # after the hub's own bars
            pipe = DiffusionPipeline.from_pretrained(str(folder), dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {error}") from error
    make = FAMILIES.get(type(pipe).__name__)
    check_weights(pipe, str(folder))
    teacher = make(pipe, source)
    commit = None if local else _commit(folder)
    return replace(teacher, card=replace(teacher.card, revision=commit), folder=folder, options=options)


def _fetch(source: str, options: dict[str, Any]) -> Path:
    """The hub's snapshot folder, once its small index has said that the family is known."""
    from diffusers import DiffusionPipeline

    index: Any = DiffusionPipeline.load_config(source, **options)
    FAMILIES.get(str(index.get("_class_name")))
    return Path(DiffusionPipeline.download(source, use_safetensors=True, **options))


def _commit(snapshot: Path) -> str | None:
    """huggingface_hub names a snapshot's folder after its commit."""
    return snapshot.name if re.fullmatch("[0-9a-f]{40}", snapshot.name) else None
