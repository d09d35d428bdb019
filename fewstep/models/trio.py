"""The three players: generator and fake score, which train, and the real score, which never does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from fewstep.models.adapters import LoRA, add_lora, share
from fewstep.models.denoiser import Denoiser, Player
from fewstep.models.discriminator import Head, taps_of
from fewstep.models.perception import Perception
from fewstep.types import Batch, Role, Turn

Sharing = Literal["copies", "lora", "lora-fake"]
"""How the trio holds its weights.

copies: a full network for each role.  lora: generator and fake score are adapters on the teacher's own weights, which
then exist once.  lora-fake: a full generator, the fake score an adapter on the teacher.
"""


@dataclass
class Trio:
    """Generator, real score (the teacher) and, where the objective asks for them, fake score and GAN head."""

    generator: Denoiser
    real_score: Denoiser
    fake_score: Denoiser | None = None
    head: Head | None = None
    fresh: Callable[[], Denoiser] | None = None  # a fake score as it is at the start
    perception: Perception | None = None  # what looks at pictures, for objectives whose `needs` name it

    def critic(self) -> Denoiser:
        """The fake score.  Raises ValueError if this trio was built without one."""
        if self.fake_score is None:
            raise ValueError("this trio has no fake score; the objective's `roles` must contain 'fake_score'")
        return self.fake_score

    def reset_fake_score(self) -> None:
        """Make the fake score, if there is one, what it was at the start: the teacher."""
        if self.fake_score is not None and self.fresh is not None:
            self.fake_score.load(self.fresh().state())

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

    def discriminator(self) -> Head:
        """The GAN head.  Raises ValueError if this trio was built without one."""
        if self.head is None:
            raise ValueError("this trio has no GAN head; the objective's `roles` must contain 'head'")
        return self.head

    def sight(self) -> Perception:
        """What looks at pictures.  Raises ValueError if this trio was built without it."""
        if self.perception is None:
            raise ValueError("nothing here looks at pictures; the objective's `needs` must contain 'lpips' or 'clip'")
        return self.perception

    def checkpoint_activations(self) -> None:
        """Recompute the activations of the networks that train instead of keeping them."""
        for network in (self.generator, self.fake_score):
            if network is not None:
                network.checkpoint_activations()

    def add_head(self, network: Denoiser, batch: Batch, taps: Sequence[str] = (), *, seed: int = 0) -> None:
        """Give it a GAN head on the outputs of named modules of `network`, by default those that its family names.

        batch: any one; its first sample's condition probes the features' shapes.  Raises ValueError if no module is
        named, LookupError for names that the network does not have.
        """
        names = taps_of(network, batch.cond, taps)
        self.head = Head.probe(network, batch.shape, batch.cond[:1], names, seed)

    @classmethod
    def build(
        cls,
        real_score: Denoiser,
        roles: frozenset[Role],
        *,
        sharing: Sharing = "copies",
        lora: LoRA | None = None,
        init: Callable[[], Denoiser] | None = None,
        student: Callable[[Callable[[], Denoiser]], Denoiser] | None = None,
        seed: int = 0,
    ) -> Trio:
        """A trio around the teacher's denoiser: generator and fake score start from its weights.  `head` is set apart.

        init: makes the network that both start from, for a teacher that is a formula or several networks.
        student: makes the generator from copies of that network, each of which is a call, for a method whose student
        is more than one copy.  seed: of the adapters' initial values.
        Raises ValueError for an unknown `sharing` and for roles that cannot be supplied.
        """
        if sharing not in get_args(Sharing):
            raise ValueError(f"sharing={sharing!r} is not known; allowed: {', '.join(get_args(Sharing))}")
        if roles - {"fake_score", "head"}:
            raise ValueError(
                f"the method asks for the roles {sorted(roles)}; this version supplies generator, real score, "
                "fake_score and head"
            )
        start = init() if init is not None else real_score
        # A skeleton of its own: what the trainer does to it (autocast, modes) must not outlive the run in the teacher.
        real_score = share(real_score).eval().requires_grad_(False)

        def full() -> Denoiser:
            role = copy.deepcopy(start).train()
            for p in role.parameters():
                if p.dtype.itemsize < 4:  # AdamW's steps are below the last bit of bf16 weights
                    p.data = p.data.float()
            return role

        def adapted() -> Denoiser:
            role = share(start).requires_grad_(False).train()
            add_lora(role.backbone.module, lora or LoRA(), seed=seed)
            return role

        make, fresh = adapted if sharing == "lora" else full, full if sharing == "copies" else adapted
        generator = make() if student is None else student(make).train()
        if "fake_score" not in roles:
            return cls(generator, real_score)
        return cls(generator, real_score, fresh(), fresh=fresh)
