"""Teachers without weights: the network on the meta device, from its config alone, for plans of what training takes."""

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
from fewstep.teachers.pipelines import DTYPES, FAMILIES
from fewstep.teachers.published import PUBLISHED, Published
from fewstep.types import Condition

CLIP_TOKENS = 77
VAE_SCALE = 8
"""Of every published teacher: tokens of a prompt, and pixels per latent."""


@dataclass(frozen=True)
class Source:
    """What is known of a pipeline without its weights.

    family: the pipeline's class.  network, scheduler: their configs.  tokens: of an encoded prompt.  vae_scale: pixels
    per latent.
    """

    family: str
    network: dict[str, Any]
    scheduler: dict[str, Any]
    tokens: int
    vae_scale: int


def outline(name_or_path: str, *, resolution: int | None = None, **options: Any) -> Teacher:
    """The teacher of this name or folder with shapes and no numbers; its prompts are encoded to zeros.

    resolution: pixels of a side; by default the one that it was trained at.  options: of `load_teacher`, of which
    source and dtype matter.
    Raises LookupError for a name of which no config is here, ValueError for options and resolutions that do not fit.
    """
    dtype, source = options.get("dtype", "fp32"), _source(name_or_path, options)
    if dtype not in DTYPES:
        raise ValueError(f"teacher.dtype={dtype!r}: allowed are {', '.join(DTYPES)}")
    with quiet(), torch.device("meta"):  # diffusers warns of casts by `to`
        network = _built(source.network).to(DTYPES[dtype]).eval()
    made = FAMILIES.get(source.family)(_pipe(source, network), name_or_path)
    shape = made.shape if resolution is None else _shape(source, made.shape, resolution)
    return replace(
        made,
        encode=_Zeros(source),
        shape=shape,
        card=TeacherCard(name_or_path, name_or_path),
        prompts=("",),
        reals=lambda: Reals(torch.zeros(1, *shape), ("",)),
        options=options,
    )


def resolution_of(name_or_path: str, shape: Sequence[int], **options: Any) -> int:
    """Pixels of a side of this teacher's samples of `shape`."""
    return shape[-1] * _source(name_or_path, options).vae_scale


class _Zeros:
    """Encodes every prompt, and the empty one, to zeros of the shapes that the family's text encoders give."""

    def __init__(self, source: Source) -> None:
        config = source.network
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._shapes["text"] = (source.tokens, config.get("cross_attention_dim") or config["text_embed_dim"])
        if source.family == "StableDiffusionXLPipeline":  # what its embedding takes beside six numbers of sizes
            sizes = 6 * config["addition_time_embed_dim"]
            self._shapes["pooled"] = (config["projection_class_embeddings_input_dim"] - sizes,)

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
        betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
        scheduler = {"_class_name": "DDIMScheduler", "prediction_type": registered.prediction_type, **betas}
        return Source(registered.pipeline, registered.architecture(), scheduler, CLIP_TOKENS, VAE_SCALE)
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
    vae, tokenizer = _json(folder / "vae" / "config.json"), _json(folder / "tokenizer" / "tokenizer_config.json")
    tokens = min(tokenizer.get("model_max_length", CLIP_TOKENS), 1024)
    return Source(family, network, scheduler, tokens, 2 ** (len(vae["block_out_channels"]) - 1))


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


def _pipe(source: Source, network: nn.Module) -> Any:
    """As much of a pipeline as a family's function looks at."""
    import diffusers

    scheduler = getattr(diffusers, source.scheduler["_class_name"]).from_config(source.scheduler)
    return SimpleNamespace(
        unet=network,
        transformer=network,
        scheduler=scheduler,
        vae=nn.Module(),  # it is off the device in training
        vae_scale_factor=source.vae_scale,
        config=SimpleNamespace(force_zeros_for_empty_prompt=True),
    )


def _shape(source: Source, shape: tuple[int, ...], resolution: int) -> tuple[int, ...]:
    step = source.vae_scale * source.network.get("patch_size", 1)
    if "block_out_channels" in source.network:  # a UNet halves its maps between blocks
        step *= 2 ** (len(source.network["block_out_channels"]) - 1)
    if resolution < step or resolution % step:
        near = max(step, round(resolution / step) * step)
        raise ValueError(f"resolution {resolution} is not a multiple of this network's {step} pixels; take {near}")
    return (shape[0], resolution // source.vae_scale, resolution // source.vae_scale)
