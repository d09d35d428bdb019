"""A student of several networks, each for its own range of noise levels     [Phased DMD, arXiv:2510.27684]"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion import Prediction
from fewstep.models.denoiser import Denoiser
from fewstep.types import Condition


@dataclass
class Active:
    """Which expert trains; one object for a student and its average."""

    index: int = 0


class Experts(Denoiser):
    """Denoisers that divide the times among them: the first answers above bounds[0], the last below all bounds.

    experts: of one schedule and kind.  bounds: their limits, descending, one less than experts.
    Only one expert trains at a time (`activate`); the state holds all of them.
    Raises ValueError for bounds that do not descend or do not fit the experts.
    """

    def __init__(self, experts: Sequence[Denoiser], bounds: Sequence[float], active: Active | None = None) -> None:
        first = experts[0]
        super().__init__(first.backbone, first.schedule, first.predicts)
        ordered = all(high > low for high, low in pairwise(bounds))
        if len(bounds) != len(experts) - 1 or not ordered:
            raise ValueError(f"{len(experts)} experts need as many descending bounds less one, got {list(bounds)}")
        self.experts = nn.ModuleList(experts)
        self.bounds = tuple(bounds)
        self.active = active or Active()

    def activate(self, index: int) -> None:
        """Let this expert train, and no other."""
        self.requires_grad_(False)
        self.active.index = index

    def forward(self, x_t: Tensor, t: Tensor, cond: Condition, *, taps: Sequence[str] = ()) -> Prediction:
        """As any denoiser; samples of different ranges go to different experts, one call each."""
        if t.shape != (x_t.shape[0],):  # before it is compared with the bounds
            raise ValueError(f"t must be [B] = [{x_t.shape[0]}], got {list(t.shape)}; expand a scalar time yourself")
        owner = torch.stack([t <= bound for bound in self.bounds]).sum(0) if self.bounds else torch.zeros_like(t).long()
        # Without numbers nobody knows whose times they are; the experts are of one size, and one of them trains.
        called = [self.active.index] if t.is_meta else owner.unique().tolist()
        if len(called) == 1:
            return self.expert(called[0])(x_t, t, cond, taps=taps)
        if taps:
            raise ValueError("features of a batch need one expert for all of it; give times of one expert's range")
        raw = torch.empty_like(x_t, dtype=torch.promote_types(x_t.dtype, torch.float32))
        for index in called:
            rows = (owner == index).nonzero()[:, 0]
            raw[rows] = self.expert(index)(x_t[rows], t[rows], cond[rows]).raw.to(raw.dtype)
        return Prediction(raw, x_t, t, self.predicts, self.schedule, guide=self.backbone.guide)

    def expert(self, index: int) -> Denoiser:
        """One of them, 0 for the noisiest levels."""
        found = self.experts[index]
        assert isinstance(found, Denoiser)
        return found

    def weights(self) -> dict[str, nn.Parameter]:
        """Those of the expert that trains."""
        index = self.active.index
        return {f"{index}.{name}": p for name, p in self.expert(index).weights().items()}

    def state(self) -> dict[str, Tensor]:
        """Every expert's state, under its number."""
        return {f"{k}.{n}": v for k in range(len(self.experts)) for n, v in self.expert(k).state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Put a `state` back.  Raises RuntimeError or ValueError if names or shapes differ."""
        for k in range(len(self.experts)):
            prefix = f"{k}."
            self.expert(k).load({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})

    def merged_state(self) -> dict[str, Tensor]:
        """Every expert's, under its number."""
        return {f"{k}.{n}": v for k in range(len(self.experts)) for n, v in self.expert(k).merged_state().items()}

    def plain_state(self) -> dict[str, Tensor]:
        """There is none.  Raises ValueError."""
        raise ValueError(
            f"a student of {len(self.experts)} experts is not one network, so there is no pipeline to export it into; "
            "use it through fewstep.load_student, or give --set method.phases=1"
        )

    def twin(self) -> Experts:
        """A copy with all experts' own weights; which of them trains stays common."""
        own = {id(p) for k in range(len(self.experts)) for p in self.expert(k).weights().values()}
        shared: dict[int, Any] = {id(p): p for p in self.parameters() if id(p) not in own}
        # In one go: experts around one teacher share its buffers, and so must their copies.
        return copy.deepcopy(self, shared | {id(self.active): self.active})

    def networks(self) -> tuple[nn.Module, ...]:
        """Every expert's."""
        return tuple(module for k in range(len(self.experts)) for module in self.expert(k).networks())

    def checkpoint_activations(self) -> None:
        """In every expert."""
        for k in range(len(self.experts)):
            self.expert(k).checkpoint_activations()
