"""The three players: generator and fake score, which train, and the real score, which never does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fewstep.models.denoiser import Denoiser
from fewstep.types import Role, Turn

Sharing = Literal["copies"]
"""How the trio holds its weights: "copies" = a full network for each role."""


@dataclass
class Trio:
    """Generator, real score (the teacher) and, where the objective asks for them, fake score and GAN head."""

    generator: Denoiser
    real_score: Denoiser
    fake_score: Denoiser | None = None
    head: nn.Module | None = None

    def critic(self) -> Denoiser:
        """The fake score.  Raises ValueError if this trio was built without one."""
        if self.fake_score is None:
            raise ValueError("this trio has no fake score; the objective's `roles` must contain 'fake_score'")
        return self.fake_score

    def players(self) -> dict[Turn, nn.ModuleList]:
        """What each turn may change."""
        players: dict[Turn, nn.ModuleList] = {"generator": nn.ModuleList([self.generator])}
        critic = [module for module in (self.fake_score, self.head) if module is not None]
        if critic:
            players["critic"] = nn.ModuleList(critic)
        return players

    @contextmanager
    def turn(self, name: Turn) -> Iterator[None]:
        """Within it only the named player's parameters require gradients; afterwards none do."""
        players = self.players()
        for player, modules in players.items():
            modules.requires_grad_(player == name)
        self.real_score.requires_grad_(False)
        try:
            yield
        finally:
            for modules in players.values():
                modules.requires_grad_(False)

    @classmethod
    def build(
        cls,
        real_score: Denoiser,
        roles: frozenset[Role],
        *,
        sharing: Sharing = "copies",
        init: Callable[[], Denoiser] | None = None,
    ) -> Trio:
        """A trio around the teacher's denoiser: generator and fake score start from its weights.

        init: makes the network that both start from, for a teacher that is a formula and not a network.
        Raises ValueError for an unknown `sharing`.
        """
        if sharing != "copies":
            raise ValueError(f"sharing={sharing!r} is not known; allowed: 'copies' (a full network for each role)")
        start = init() if init is not None else real_score
        generator = copy.deepcopy(start).train()
        fake_score = copy.deepcopy(start).train() if "fake_score" in roles else None
        real_score = real_score.eval().requires_grad_(False)
        return cls(generator, real_score, fake_score)
