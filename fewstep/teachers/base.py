"""What a teacher brings: its denoiser, its prompts' encoder, its pictures and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fewstep.diffusion.samplers import Method
from fewstep.models.denoiser import Denoiser
from fewstep.registry import Registry
from fewstep.types import Condition


class PromptEncoder(Protocol):
    """Prompts to conditions; the condition carries the empty prompt for guidance."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> Condition with [B, ...] tensors."""
        ...


class Codec(Protocol):
    """Between the space where diffusion runs and what a person looks at."""

    def decode(self, x: Tensor) -> Tensor:
        """[B, *shape] samples -> images [B, C, H, W] float32 in [-1, 1] (points are returned as they are)."""
        ...


Measure = Callable[[Tensor, Sequence[str]], dict[str, float]]
"""Images [N, C, H, W] in [-1, 1] and their prompts -> named figures, such as {"fmd": 12.3}."""


@dataclass(frozen=True)
class Evaluation:
    """How samples of this teacher are judged, and the teacher's own stored figures.

    metric: the name of the figure that ranks checkpoints (lower is better).  rows: the teacher's stored measurements.
    """

    measure: Measure
    metric: str
    protocol_hash: str
    rows: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class TeacherCard:
    """Name, source (hub id or folder), licence and one line of description."""

    name: str
    source: str
    licence: str = "unknown"
    description: str = ""


@dataclass(frozen=True)
class Teacher:
    """Everything about a pretrained diffusion model that distillation needs.

    denoiser: the real score.  encode: prompts to conditions.  codec: latents to images.  shape: one sample's shape.
    prompts: default prompts to distil on; none if only the user can know them.
    grid: (steps) -> the pipeline's own descending times [steps + 1].
    solver, guidance: how its pipeline samples.
    student: makes the network that generator and fake score start from where the teacher is a formula.
    folder: the diffusers folder that the teacher was loaded from, for export.
    """

    denoiser: Denoiser
    encode: PromptEncoder
    codec: Codec
    shape: tuple[int, ...]
    card: TeacherCard
    prompts: tuple[str, ...]
    grid: Callable[[int], Tensor]
    solver: Method = "euler"
    guidance: float = 1.0
    evaluation: Evaluation | None = None
    student: Callable[[], Denoiser] | None = None
    folder: Path | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def showing(self, prompts: Sequence[str]) -> Teacher:
        """This teacher with `prompts` as its own if it brings none; its own are its evaluation's and stay."""
        return self if self.prompts else replace(self, prompts=tuple(prompts))

    def to(self, device: torch.device | str) -> Teacher:
        """Move the denoiser; encoders and codec follow on use."""
        self.denoiser.to(device)
        return self


TEACHERS: Registry[Callable[..., Teacher]] = Registry("teacher")
register_teacher = TEACHERS.register
