"""Value objects that cross packages: what a network is told, what a step works on, what an objective returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["x0", "eps", "v", "flow"]
"""What a network's raw output means: clean sample, noise, v = alpha eps - sigma x0, or flow = eps - x0."""

Turn = Literal["generator", "critic"]
"""Who is updated: the generator, or the critic (fake score and GAN head together)."""

Role = Literal["fake_score", "head", "ema"]
"""Networks that an objective asks for beside generator and real score."""

Need = Literal["latents", "pairs", "jvp", "blocks", "lpips", "clip", "black"]
"""What an objective needs from the data or the teacher: real samples, pairs of the teacher's ODE, sound derivatives
along a path, a network that is a chain of blocks, LPIPS or CLIP to look at pictures, a black one.  Checked before any
weight is loaded where that is possible."""


@dataclass(frozen=True)
class Condition:
    """What a network is told besides x_t and t.

    tensors: name -> [B, ...].  null: name -> [1, ...], the empty prompt's, the same names; empty if the model has no
    unconditional branch.  extra: name -> [B, ...], what is no part of the prompt and only a student is told, such as
    the time to which it is to go; see `Backbone.extras`.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    null: Mapping[str, Tensor] = field(default_factory=dict)
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def also(self, **extra: Tensor) -> Condition:
        """The same condition, and these tensors [B, ...] beside those that `extra` holds already."""
        return Condition(self.tensors, self.null, {**self.extra, **extra})

    def unconditional(self) -> Condition:
        """The same condition with every sample's prompt replaced by the empty one.

        Raises ValueError if the model has no empty prompt.
        """
        if not self.null:
            raise ValueError(
                "this teacher has no unconditional branch; use guidance 1, or a teacher with a null prompt"
            )
        return Condition(
            {k: self.null[k].to(v).expand(v.shape[0], *self.null[k].shape[1:]) for k, v in self.tensors.items()},
            self.null,
            self.extra,
        )

    def emptied(self, rows: Tensor) -> Condition:
        """The same condition with the empty prompt in these rows, [B] bool.  Raises ValueError if there is none."""
        empty = self.unconditional().tensors
        mixed = {k: torch.where(rows.view(-1, *[1] * (v.ndim - 1)), empty[k], v) for k, v in self.tensors.items()}
        return Condition(mixed, self.null, self.extra)

    def to(self, device: object) -> Condition:
        """Every tensor on `device` (a torch.device or its name)."""
        moved = [{k: v.to(device) for k, v in group.items()} for group in (self.tensors, self.null, self.extra)]  # type: ignore[call-overload]
        return Condition(*moved)

    def __getitem__(self, index: slice | Tensor) -> Condition:
        """The condition of a slice of the batch, or of the rows [N] long, in their order."""
        tensors, extra = ({k: v[index] for k, v in group.items()} for group in (self.tensors, self.extra))
        return Condition(tensors, self.null, extra)


class Real(NamedTuple):
    """Samples of the data and what they show: x0 [B, C, H, W] in the space where diffusion runs, their own captions."""

    x0: Tensor
    cond: Condition


class Pair(NamedTuple):
    """What a teacher's ODE makes of given noise.

    noise: unit normals [B, C, H, W].  x0: its sample, the same shape.  cond: what it was made for.
    """

    noise: Tensor
    x0: Tensor
    cond: Condition


@dataclass(frozen=True)
class Batch:
    """The samples of one micro-batch.

    cond: their conditions.  shape: one sample's shape (C, H, W) in the space where diffusion runs.  sample_ids: their
    global indices, B of them; noise is keyed by them, so ranks and micro-batches draw what one big batch would.
    real: as many samples of the data, for a method whose `needs` name latents; unrelated to `cond`.
    pair: as many of the teacher's pairs, for a method whose `needs` name pairs; unrelated to `cond`, too.
    prompts: the texts that `cond` encodes, B of them; none in a batch made by hand.
    """

    cond: Condition
    shape: tuple[int, ...]
    sample_ids: tuple[int, ...]
    real: Real | None = None
    pair: Pair | None = None
    prompts: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.sample_ids)


class Loss(NamedTuple):
    """A scalar to back-propagate (mean over the batch) and detached scalars to log.

    grads: each term's gradient at the student's samples, where there are terms; the backward pass writes them.
    """

    total: Tensor
    metrics: Mapping[str, Tensor] = {}
    grads: Mapping[str, Tensor] = {}
