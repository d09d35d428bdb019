"""What an objective is: a frozen dataclass of its own hyper-parameters with one or two pure loss methods."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from fewstep.models.trio import Trio
from fewstep.objectives.rollout import StudentSampler
from fewstep.registry import Registry
from fewstep.rng import Rng
from fewstep.types import Batch, Loss, Need, Role, Turn


@dataclass(frozen=True, kw_only=True)
class Turns:
    """Who is updated at which iteration; the only place where step parity exists.

    critic_per_generator: critic updates for each generator update (two-time-scale rule).
    critic_warmup: first iterations in which only the critic moves.
    exclusive: the generator's iterations leave the critic alone (ratio 5 is then 4:1).
    """

    critic_per_generator: int = 1
    critic_warmup: int = 0
    exclusive: bool = False

    def __post_init__(self) -> None:
        if self.critic_per_generator < 1:
            raise ValueError(f"critic_per_generator must be >= 1, got {self.critic_per_generator}")
        if self.critic_warmup < 0:
            raise ValueError(f"critic_warmup must be >= 0, got {self.critic_warmup}")

    def at(self, iteration: int) -> tuple[Turn, ...]:
        """The turns of an iteration (counted from 0), in order."""
        since = iteration - self.critic_warmup
        if since < 0 or since % self.critic_per_generator:
            return ("critic",)
        return ("generator",) if self.exclusive else ("generator", "critic")


class Objective(Protocol):
    """A distillation method.  Implementations are frozen keyword-only dataclasses without any state.

    Losses are means over the micro-batch.  A method that must back-propagate several graphs one after the other
    yields several `Loss`es; each needs a rollout of its own, since the first backward frees the graph.
    """

    @property
    def roles(self) -> frozenset[Role]:
        """The networks it trains beside the generator; a class variable where that does not depend on its settings."""
        ...

    @property
    def needs(self) -> frozenset[Need]:
        """What it asks of the data."""
        ...

    @property
    def turns(self) -> Turns:
        """Who is updated when."""
        ...

    @property
    def sampler(self) -> StudentSampler:
        """How the student makes images: what it is trained for, evaluated with and exported with."""
        ...

    def generator_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss | Iterable[Loss]:
        """What the generator descends."""
        ...

    def critic_loss(self, trio: Trio, batch: Batch, rng: Rng) -> Loss | Iterable[Loss]:
        """What fake score and head descend; called only if `roles` asks for them."""
        ...


def check_positive(method: Objective, *names: str) -> None:
    """Raises ValueError for the first of these settings that is not positive and finite."""
    for name in names:
        value = getattr(method, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive finite number, got {value}")


METHODS: Registry[type] = Registry("method")
register_objective = METHODS.register
