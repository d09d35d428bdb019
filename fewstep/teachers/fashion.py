"""The embedded teachers: small pipelines trained on Fashion-MNIST, with how they are judged and what they scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.metrics.clip_score import load_clip_scorer
from fewstep.metrics.features import FASHION_CLASSIFIER, extract, load_fashion_classifier, load_reference
from fewstep.metrics.frechet import Moments, moments_distance
from fewstep.metrics.suite import Suite, load_suite
from fewstep.models.perception import feature_distance
from fewstep.teachers.base import Evaluation, Reals, Teacher, TeacherCard, register_teacher
from fewstep.teachers.pipelines import from_pipeline

WEIGHTS = Path(__file__).parent / "weights"


@register_teacher("fashion-dit")
def fashion_dit() -> Teacher:
    """The embedded text-to-image teacher: Fashion-MNIST, 32x32, a latent CogView4 transformer of 2.5M parameters."""
    return _embedded("fashion-dit")


@register_teacher("fashion-unet")
def fashion_unet() -> Teacher:
    """The same pictures and prompts by a Stable Diffusion in miniature: a latent UNet of 2.5M parameters, eps, DDIM."""
    return _embedded("fashion-unet")


def _embedded(name: str) -> Teacher:
    """The shipped folder of this name, with its prompts, its best stored guidance and its evaluation."""
    folder = WEIGHTS / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"the embedded teacher's weights are not at {folder}; build them with `make teachers`")
    teacher = from_pipeline(str(folder))
    codec: Any = teacher.codec
    return replace(
        teacher,
        card=TeacherCard(
            name, "embedded", "Apache-2.0 (data: Fashion-MNIST, MIT)", "text to 32x32 pictures of clothes"
        ),
        prompts=fashion_prompts(),
        guidance=_stored_guidance(folder),
        evaluation=fashion_evaluation(folder),
        reals=fashion_reals,
        lpips=lambda: feature_distance(codec.features),  # VGG does not know such pictures; the classifier measures only
        clip=load_clip_scorer,
    )


def fashion_prompts() -> tuple[str, ...]:
    """All captions, one class after the other: the first ten are one prompt of each class."""
    from fewstep.teachers.fashion_build.captions import CLASS_NAMES, TEMPLATES, captions_of

    return tuple(captions_of(label)[k] for k in range(len(TEMPLATES)) for label in range(len(CLASS_NAMES)))


def fashion_reals() -> Reals:
    """10,000 training images as latents of the teachers' VAE; number i's caption is template i mod 10 of its class."""
    from safetensors.torch import load_file

    from fewstep.teachers.fashion_build.captions import TEMPLATES, captions_of

    path = WEIGHTS / "fashion-reals" / "latents.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"no real samples at {path}; build them with `make teachers STAGE=reals`")
    stored = load_file(path)
    captions = [captions_of(label)[i % len(TEMPLATES)] for i, label in enumerate(stored["labels"].tolist())]
    return Reals(stored["latents"], tuple(captions))


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

    In full, all figures of metrics/suite.py.  None if the classifier is not built yet.
    """
    if not (FASHION_CLASSIFIER / "model.safetensors").is_file():
        return None
    from fewstep.teachers.fashion_build.captions import caption_labels

    classifier, reference = load_fashion_classifier(), load_reference()
    label_of = caption_labels()

    def measure(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        features, logits = extract(classifier, images)
        figures = {"fmd": moments_distance(Moments.of(features), reference)}
        wanted = [label_of.get(prompt, -1) for prompt in prompts]
        if min(wanted) >= 0:
            figures["agreement"] = float((logits.argmax(1) == torch.tensor(wanted)).double().mean())
        return figures

    @cache
    def suite() -> Suite:
        return load_suite(label_of)

    def full(images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        return suite().measure_all(images, prompts)

    card = json.loads((FASHION_CLASSIFIER / "card.json").read_text(encoding="utf-8"))
    stored = _stored(folder)
    return Evaluation(
        measure,
        "fmd",
        card["protocol_hash"],
        tuple(stored.get("rows", ())),
        rows_protocol=stored.get("protocol_hash"),
        full=full,
    )
