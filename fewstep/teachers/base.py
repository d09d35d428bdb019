"""What a teacher brings: its denoiser, its prompts' encoder, its pictures and how good it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fewstep.diffusion.samplers import Method
from fewstep.metrics.clip_score import ClipScorer
from fewstep.models.denoiser import Denoiser
from fewstep.models.perception import Distance
from fewstep.registry import Registry
from fewstep.teachers.codecs import PipelineEncoder, TextEncoders
from fewstep.types import Condition


class PromptEncoder(Protocol):
    """Prompts to conditions; the condition carries the empty prompt for guidance."""

    def __call__(self, prompts: Sequence[str]) -> Condition:
        """B prompts -> Condition with [B, ...] tensors.

        A row's numbers do not depend on the other prompts, but for its length, the first dimension: it may be padded
        with zeros.  "length" [B] int64, if there, says how many tokens of "text" count.
        """
        ...


class Codec(Protocol):
    """Between the space where diffusion runs and what a person looks at."""

    def decode(self, x: Tensor) -> Tensor:
        """[B, *shape] samples -> images [B, C, H, W] float32 in [-1, 1] (points are returned as they are)."""
        ...

    def render(self, x: Tensor) -> Tensor:
        """`decode` with a gradient for x, all at once and not clamped, for losses of pictures."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """The way back: [B, C, H, W] in [-1, 1] -> [B, *shape]."""
        ...

    def image_shape(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """The (C, H, W) of the images that samples of this shape decode to."""
        ...


class Latents(Protocol):
    """Samples in the space where diffusion runs, [N, *shape]: a tensor, or what reads rows of one from the disk."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor:
        """The rows [B] long, in their order."""
        ...


@dataclass(frozen=True)
class Reals:
    """Samples of the data that a teacher was trained on or is to be judged by.

    latents: [N, *shape], any float dtype, in the space where diffusion runs.  captions: their N prompts.
    """

    latents: Tensor | Latents
    captions: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.captions) or not self.captions:
            raise ValueError(f"{len(self.latents)} latents and {len(self.captions)} captions do not belong together")


Measure = Callable[[Tensor, Sequence[str]], dict[str, float]]
"""Images [N, C, H, W] in [-1, 1] and their prompts -> named figures, such as {"fmd": 12.3}."""


@dataclass(frozen=True)
class Evaluation:
    """How samples of this teacher are judged, and the teacher's own stored figures.

    metric: the name of the figure that ranks checkpoints (lower is better).  rows: the teacher's stored measurements.
    rows_protocol: the hash of the protocol that the rows were measured with.
    full: every figure that there is, for final tables; `measure`, which it contains, is also the running metric.
    """

    measure: Measure
    metric: str
    protocol_hash: str
    rows: tuple[dict[str, Any], ...] = ()
    rows_protocol: str | None = None
    full: Measure | None = None


@dataclass(frozen=True)
class FewSteps:
    """How a family's pipeline runs a student in its few steps, for export.

    part: the pipeline's network that the student replaces.  set_up: (pipeline, levels [N], told [N], stochastic) -> the
    arguments of its call; gives it a scheduler for the student's levels in [0, 1], which the network is told as `told`.
    seeded: whether the scheduler draws its noise from the call's generator.  tells: the student's times on the
    network's scale [N] -> those that the pipeline can tell, by default whole ones.  gives: where its call's result is.
    packed: whether it carries latents as tokens, see `models.patches`: those that a call hands over, and the order of
    the noise drawn between steps.  asks: its call's first argument in Python, what is to be seen.
    """

    part: str
    set_up: Callable[[Any, Tensor, Tensor, bool], dict[str, Any]]
    seeded: bool
    tells: Callable[[Tensor], Tensor] = torch.round
    gives: Literal["images", "frames"] = "images"
    packed: bool = False
    asks: Literal["prompt", "[label]"] = "prompt"


@dataclass(frozen=True)
class TeacherCard:
    """Name, source (hub id or folder), licence and one line of description.

    revision: the hub's commit that was loaded, if it came from there.  restrictions: what binds its users, a sentence
    each.
    """

    name: str
    source: str
    licence: str = "unknown"
    description: str = ""
    revision: str | None = None
    restrictions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Teacher:
    """Everything about a pretrained diffusion model that distillation needs.

    denoiser: the real score.  encode: prompts to conditions.  codec: latents to images.  shape: one sample's shape.
    prompts: default prompts to distil on; none if only the user can know them.
    grid: (steps) -> the pipeline's own descending times [steps + 1].
    solver, guidance: how its pipeline samples.
    student: makes, or names, the network that generator and fake score start from where the teacher is a formula, or
    several networks.
    folder, few_steps: the diffusers folder that the teacher was loaded from and how it runs a student, for export.
    reals: loads the real samples that come with the teacher, if any.
    encoders: the text encoders that `encode` runs, if they are large enough to be moved and freed.
    lpips, clip: load a perceptual distance of its pictures, none for points, and a CLIP that knows them, if any.
    """

    denoiser: Denoiser
    encode: PromptEncoder
    codec: Codec
    shape: tuple[int, ...]
    card: TeacherCard
    prompts: Sequence[str]
    grid: Callable[[int], Tensor]
    solver: Method = "euler"
    guidance: float = 1.0
    evaluation: Evaluation | None = None
    student: Callable[[], Denoiser] | None = None
    folder: Path | None = None
    few_steps: FewSteps | None = None
    reals: Callable[[], Reals] | None = None
    lpips: Callable[[], Distance] | None = None
    clip: Callable[[], ClipScorer] | None = None
    encoders: TextEncoders | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def showing(self, prompts: Sequence[str]) -> Teacher:
        """This teacher with `prompts` as its own if it brings none; its own are its evaluation's and stay."""
        return self if self.prompts else replace(self, prompts=prompts)

    def against(self, negative_prompt: str) -> Teacher:
        """This teacher with a negative prompt in the place of the empty one, for guidance.

        Raises ValueError if the teacher has no unconditional branch.
        """
        encode = self.encode
        if not encode(self.prompts[:1] or ("",)).null:
            raise ValueError(f"teacher {self.card.name!r} has no unconditional branch for a negative prompt to replace")
        if isinstance(encode, PipelineEncoder):
            return replace(self, encode=encode.against(negative_prompt))

        def with_negative(prompts: Sequence[str]) -> Condition:
            # Encoded together, so that its rows are as long as the others'.
            rows = encode([*prompts, negative_prompt]).tensors
            return Condition({k: v[:-1] for k, v in rows.items()}, {k: v[-1:] for k, v in rows.items()})

        return replace(self, encode=with_negative)

    def to(self, device: torch.device | str) -> Teacher:
        """Move the denoiser.  Text encoders move by `encoding_on` alone; the codec goes where its input is."""
        self.denoiser.to(device)
        return self

    def encoding_on(self, device: torch.device | str) -> AbstractContextManager[None]:
        """Within it the text encoders are on this device, afterwards on the CPU."""
        return nullcontext() if self.encoders is None else self.encoders.on(device)

    def release(self, keep: Sequence[str] = ()) -> None:
        """Free the memory of the text encoders; a prompt that is not among `keep` loads them again."""
        if self.encoders is not None:
            if keep:
                self.encode(keep)
            self.encoders.release()


TEACHERS: Registry[Callable[..., Teacher]] = Registry("teacher")
register_teacher = TEACHERS.register
