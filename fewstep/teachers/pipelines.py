"""Teachers that are diffusers pipelines: a registered name, a local folder or a hub id."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fewstep.diffusion import RectifiedFlow, shift_time
from fewstep.metrics.features import FASHION_CLASSIFIER, extract, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.models.backbones import CogView4
from fewstep.models.denoiser import Denoiser
from fewstep.registry import Registry
from fewstep.teachers.base import TEACHERS, Evaluation, Teacher, TeacherCard, register_teacher
from fewstep.teachers.folders import check_folder, check_weights, quiet
from fewstep.types import Condition

WEIGHTS = Path(__file__).parent / "weights"

FAMILIES: Registry[Callable[..., Teacher]] = Registry("pipeline class")
"""Pipeline class name -> a function that makes a Teacher of the loaded pipeline."""


@register_teacher("fashion-dit")
def fashion_dit() -> Teacher:
    """The embedded text-to-image teacher: Fashion-MNIST, 32x32, a latent CogView4 transformer of 2.5M parameters."""
    folder = WEIGHTS / "fashion-dit"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded teacher's weights are not at {folder}; build them with `make teachers`")
    teacher = from_pipeline(str(folder))
    return replace(
        teacher,
        card=TeacherCard(
            "fashion-dit", "embedded", "Apache-2.0 (data: Fashion-MNIST, MIT)", "text to 32x32 pictures of clothes"
        ),
        prompts=_fashion_prompts(),
        guidance=_stored_guidance(folder),
        evaluation=fashion_evaluation(folder),
    )


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


def from_pipeline(source: str, *, revision: str | None = None) -> Teacher:
    """Load a diffusers pipeline folder or hub id (weights in float32) and hand it to its family.

    Raises ValueError for what cannot be loaded, LookupError for a pipeline class of no known family.
    """
    folder = Path(source)
    if folder.exists():
        FAMILIES.get(check_folder(folder))
    from diffusers import DiffusionPipeline

    options = {} if revision is None else {"revision": revision}
    try:
        with quiet():
            pipe = DiffusionPipeline.from_pretrained(source, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise ValueError(f"cannot load the pipeline {source!r}: {error}") from error
    make = FAMILIES.get(type(pipe).__name__)
    check_weights(pipe, source)
    return replace(make(pipe, source), folder=folder if folder.exists() else None, options=options)


@FAMILIES.register("CogView4Pipeline")
def cogview4(pipe: Any, source: str) -> Teacher:
    """CogView4: one transformer, one text encoder, rectified flow; t is the time after its scheduler's shift."""
    transformer = pipe.transformer.config
    shape = (transformer.in_channels, transformer.sample_size, transformer.sample_size)

    def grid(steps: int) -> Tensor:
        """CogView4Pipeline's own times: integers from 1000 down to 1, shifted by the scheduler, then 0."""
        indices = torch.linspace(1000, 1, steps, dtype=torch.float64).long().tolist()
        pipe.scheduler.set_timesteps(timesteps=indices, sigmas=[i / 1000 for i in indices], mu=_mu(pipe))
        return pipe.scheduler.sigmas.clone()

    return Teacher(
        denoiser=Denoiser(
            ShiftedCogView4(pipe.transformer, pipe.vae_scale_factor, _shift(pipe)), RectifiedFlow(), "flow"
        ),
        encode=PipelineEncoder(pipe),
        codec=VAECodec(pipe.vae),
        shape=shape,
        card=TeacherCard(source, source),
        prompts=(),
        grid=grid,
        guidance=5.0,
    )


class ShiftedCogView4(CogView4):
    """CogView4 as its pipeline calls it: the scheduler shifts the noise level, but the network is told the time before.

    t = k u / (1 + (k - 1) u) is the noise level, u * 1000 what the network was trained with.
    """

    def __init__(self, module: nn.Module, vae_scale: int, shift: float) -> None:
        super().__init__(module, vae_scale)
        self.shift = shift

    def network_time(self, t: Tensor) -> Tensor:
        """0..1000."""
        return super().network_time(shift_time(t, 1 / self.shift))


def _shift(pipe: Any) -> float:
    """The factor k by which the pipeline's scheduler shifts times.  Raises ValueError for other spacings."""
    config = pipe.scheduler.config
    names = ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas")
    used = [name for name in names if config.get(name)]
    if used:
        raise ValueError(f"the scheduler's {', '.join(used)} cannot be used here; its times must only be shifted")
    mu = _mu(pipe)
    if mu is None:
        return float(config.get("shift", 1.0))
    return mu if config.get("time_shift_type", "exponential") == "linear" else math.exp(mu)


def _mu(pipe: Any) -> float | None:
    """The scheduler's dynamic shift for the pipeline's native size, if it has one."""
    config = pipe.scheduler.config
    if not config.get("use_dynamic_shifting", False):
        return None
    from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

    tokens = (pipe.transformer.config.sample_size // pipe.transformer.config.patch_size) ** 2
    return calculate_shift(
        tokens, config.get("base_image_seq_len", 256), config.get("base_shift", 0.25), config.get("max_shift", 0.75)
    )


class PipelineEncoder:
    """Prompts to text embeddings by the pipeline's own `encode_prompt`, one prompt at a time, each once.

    One at a time because CogView4Pipeline pads to the longest prompt of the call: in a batch, a prompt's embedding
    would depend on its neighbours.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._longest = min(pipe.tokenizer.model_max_length, 1024)  # the pipeline's default, less for a small encoder
        self._known: dict[str, Tensor] = {}

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        if prompt not in self._known:
            embeds, _ = self._pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=self._longest
            )
            self._known[prompt] = embeds.detach()
        return self._known[prompt]

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> {"text": [B, L, D]}, L the pipeline's padded length of the empty prompt.

        The pipeline pads to multiples of 16 tokens.  Raises ValueError for a prompt of another padded length: one
        call's rows, and the empty prompt of guidance, must be equally long.
        """
        rows = [self._encode(p) for p in prompts]
        lengths = {row.shape[1] for row in rows}
        null = self._encode("")
        if lengths != {null.shape[1]}:
            raise ValueError(
                f"a prompt takes {max(lengths)} padded tokens, the empty prompt {null.shape[1]}; this version needs "
                "them equal: use shorter prompts"
            )
        return Condition({"text": torch.cat(rows)}, {"text": null})


class VAECodec:
    """AutoencoderKL latents to images as CogView4Pipeline decodes them: divided by the scaling factor."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae.requires_grad_(False)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 1 or 3, H', W'] in [-1, 1]."""
        vae = self._vae.to(x.device)
        return vae.decode(x.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)


def _fashion_prompts() -> tuple[str, ...]:
    """All captions, one class after the other: the first ten are one prompt of each class."""
    from fewstep.teachers.fashion_build.captions import CLASS_NAMES, TEMPLATES, captions_of

    return tuple(captions_of(label)[k] for k in range(len(TEMPLATES)) for label in range(len(CLASS_NAMES)))


def _stored(folder: Path) -> dict[str, Any]:
    path = folder / "teacher.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _stored_guidance(folder: Path) -> float:
    """The guidance of the best stored row with the most steps; 1.5 before any is stored."""
    rows = _stored(folder).get("rows", [])
    if not rows:
        return 1.5
    steps = max(row["steps"] for row in rows)
    return min((row for row in rows if row["steps"] == steps), key=lambda row: row["fmd"])["cfg"]


def fashion_evaluation(folder: Path) -> Evaluation | None:
    """FMD against the 60,000 training images, and the share of samples classified as the prompt says.

    None if the classifier is not built yet.
    """
    if not (FASHION_CLASSIFIER / "model.safetensors").is_file():
        return None
    from fewstep.teachers.fashion_build.captions import CLASS_NAMES, captions_of

    classifier, reference = load_fashion_classifier(), load_reference()
    label_of = {caption: label for label in range(len(CLASS_NAMES)) for caption in captions_of(label)}

    def measure(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        features, logits = extract(classifier, images)
        figures = {"fmd": moments_distance(Moments.of(features), reference)}
        wanted = [label_of.get(prompt, -1) for prompt in prompts]
        if min(wanted) >= 0:
            figures["agreement"] = float((logits.argmax(1) == torch.tensor(wanted)).double().mean())
        return figures

    card = json.loads((FASHION_CLASSIFIER / "card.json").read_text(encoding="utf-8"))
    return Evaluation(measure, "fmd", card["protocol_hash"], tuple(_stored(folder).get("rows", ())))
