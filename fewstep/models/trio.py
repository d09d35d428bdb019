"""The three players: generator and fake score, which train, and the real score, which never does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from fewstep.models.denoiser import Denoiser, Player
from fewstep.types import Role, Turn

Sharing = Literal["copies"]
"""How the trio holds its weights: "copies" = a full network for each role."""


@dataclass
class Trio:
    """Generator, real score (the teacher) and, where the objective asks for them, fake score and GAN head."""

    generator: Denoiser
    real_score: Denoiser
    fake_score: Denoiser | None = None
    head: Player | None = None

    def critic(self) -> Denoiser:
        """The fake score.  Raises ValueError if this trio was built without one."""
        if self.fake_score is None:
            raise ValueError("this trio has no fake score; the objective's `roles` must contain 'fake_score'")
        return self.fake_score

    def players(self) -> dict[Turn, dict[str, Player]]:
        """The networks that each turn trains, by role."""
        critic = {"fake_score": self.fake_score, "head": self.head}
        players: dict[Turn, dict[str, Player]] = {
            "generator": {"generator": self.generator},
            "critic": {role: network for role, network in critic.items() if network is not None},
        }
        return {turn: networks for turn, networks in players.items() if networks}

    def weights(self, turn: Turn) -> list[nn.Parameter]:
        """The parameters that a turn trains, always in the same order."""
        return [p for network in self.players().get(turn, {}).values() for p in network.weights().values()]

    @contextmanager
    def turn(self, name: Turn) -> Iterator[None]:
        """Within it only the named player's parameters require gradients; afterwards none do."""
        self.real_score.requires_grad_(False)
        weights: dict[Turn, list[nn.Parameter]] = {turn: self.weights(turn) for turn in get_args(Turn)}
        for turn, parameters in weights.items():
            for p in parameters:
                p.requires_grad_(turn == name)
        try:
            yield
        finally:
            for p in weights[name]:
                p.requires_grad_(False)

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
        Raises ValueError for an unknown `sharing` and for roles that cannot be supplied.
        """
        if roles - {"fake_score"}:
            raise ValueError(
                f"the method asks for the roles {sorted(roles)}; this version supplies generator, real score and "
                "fake_score"
            )
        if sharing != "copies":
            raise ValueError(f"sharing={sharing!r} is not known; allowed: 'copies' (a full network for each role)")
        start = init() if init is not None else real_score
        generator = copy.deepcopy(start).train()
        fake_score = copy.deepcopy(start).train() if "fake_score" in roles else None
        real_score = real_score.eval().requires_grad_(False)
        return cls(generator, real_score, fake_score)
