"""Teachers in one safetensors file of the original layout: known by the names in it, unpacked once into a folder.

Such a file holds weights alone.  How they are put together, and the tokenizers, come from a pipeline of the same kind.
"""

from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fewstep.environment import cache_folder
from fewstep.teachers import hub
from fewstep.teachers.folders import PICKLES, check_folder, check_weights, contents, quiet, sampled

SUFFIX = ".safetensors"
PARTS = {"UNet": "model.diffusion_model.", "VAE": "first_stage_model."}
TEXTS = {
    "cond_stage_model.transformer.": "StableDiffusionPipeline",  # 1.x
    "cond_stage_model.model.": "StableDiffusionPipeline",  # 2.x
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
}
"""Before the names of each part; a text encoder's tell the pipeline's class."""


def is_single(source: str) -> bool:
    """Whether this names a file of weights, be it there or not, and not a folder or hub id."""
    return Path(source).suffix in PICKLES | {SUFFIX} and not Path(source).is_dir()


def class_of(file: Path) -> str:
    """The pipeline class of a file, by the names in its header.  Raises ValueError for any but a whole checkpoint."""
    if file.suffix in PICKLES:
        raise ValueError(
            f"{file} is a pickle, which can run code when loaded; take the {SUFFIX} of the same model, or convert it "
            "in a place that may be harmed"
        )
    if not file.is_file():
        raise ValueError(f"no file at {file}; name a {SUFFIX} file, a diffusers folder or a hub id")
    try:
        with safe_open(file, "pt") as stored:
            names = list(stored.keys())
    except SafetensorError as error:
        raise ValueError(f"{file} is no safetensors file, or it is cut off: {error}") from error
    found = [family for start, family in TEXTS.items() if any(name.startswith(start) for name in names)]
    lacking = [part for part, start in PARTS.items() if not any(name.startswith(start) for name in names)]
    lacking += [] if found else ["text encoder"]
    if lacking:
        raise ValueError(
            f"{file} holds no {', no '.join(lacking)} by the names in it; a teacher's file is a whole checkpoint of "
            "Stable Diffusion 1.x, 2.x or SDXL in its original layout, and no LoRA or single network"
        )
    return found[-1]


def unpacked(file: Path, config: str | None) -> Path:
    """The file as a diffusers folder in the user's cache, in the dtype that it has: made once, as large as the file.

    config: whose configs and tokenizers go with it, a folder or a hub id (ID or ID@REVISION).
    Raises ValueError for a file that is no whole checkpoint, or a config that is missing or does not fit it.
    """
    family = class_of(file)
    if config is None:
        raise ValueError(
            f"{file} holds weights alone: name a pipeline of its kind for the configs, --set teacher.config=FOLDER (or "
            f"a hub id), or say which model it is, as --teacher sdxl --set teacher.source={file}"
        )
    configs = Path(config) if Path(config).is_dir() else hub.fetch_configs(config)
    if (kind := check_folder(configs)) != family:
        raise ValueError(f"{file} is a {family} by the names in it, and teacher.config={config} is a {kind}")
    digest = sha256(contents(configs, ("",)).encode())
    digest.update(sampled(file))
    folder = cache_folder() / "teachers" / digest.hexdigest()
    if not folder.is_dir():
        _unpack(file, family, configs, folder)
    return folder


def _dtype_in(file: Path) -> torch.dtype:
    """That of all its weights, or float32 if they have several."""
    halves = {"F16": torch.float16, "BF16": torch.bfloat16}
    with safe_open(file, "pt") as stored:
        found = {stored.get_slice(name).get_dtype() for name in stored.keys()} - {"I64"}  # noqa: SIM118
    return halves.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def _unpack(file: Path, family: str, configs: Path, folder: Path) -> None:
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    # What a damaged file raises there depends on where in the renaming it is missed.
    damaged = (OSError, ValueError, RuntimeError, TypeError, KeyError, AttributeError, SingleFileComponentError)
    try:
        with quiet():
            load = getattr(diffusers, family).from_single_file
            pipe: Any = load(str(file), config=str(configs), dtype=_dtype_in(file))
    except damaged as error:
        raise ValueError(
            f"cannot load {str(file)!r} with the configs of {str(configs)!r}: weights are missing, or of another shape "
            f"than these configs say ({error})"
        ) from error
    check_weights(pipe, str(file))
    temporary = folder.parent / f".writing-{folder.name}-{os.getpid()}"
    try:
        pipe.save_pretrained(temporary, safe_serialization=True)
        os.replace(temporary, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
