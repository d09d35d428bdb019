"""What an objective is: a frozen dataclass of its own hyper-parameters with one or two pure loss methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from fewstep.models.denoiser import Denoiser
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

    What only some methods have, and others leave out:
    student(make, seed) -> Denoiser: the generator, of copies of the start network, each of which is a call of make.
    stages: tuple[Stage, ...], trained one after the other.  begin(trio): a stage's preparation, also on resume.
    probe(trio, batch, rng): raises RuntimeError if the derivatives that its losses take are not sound; called once
    before training if `needs` names jvp.
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


class Stage(NamedTuple):
    """A part of a run with an objective of its own, for a share of the iterations (see `stages_of`).

    At its start the fake score is the teacher again, the optimisers and their rates start anew, and the averaged
    weights become the generator's.  The roles, needs and sampler of the run are those of the method as a whole.
    rate: what both players' learning rates are multiplied by in it.
    """

    objective: Objective
    share: float
    rate: float = 1.0


def stages_of(method: Objective) -> tuple[Stage, ...]:
    """The stages of a method; of most, one."""
    return getattr(method, "stages", None) or (Stage(method, 1.0),)


def student_of(method: Objective, seed: int) -> Callable[[Callable[[], Denoiser]], Denoiser] | None:
    """What makes the method's generator from copies of the start network; None if it is one such copy.

    seed: of the values of parts that are not the teacher's.
    """
    own = getattr(method, "student", None)
    return None if own is None else lambda make: own(make, seed)


def check_positive(method: Objective, *names: str) -> None:
    """Raises ValueError for the first of these settings that is not positive and finite."""
    for name in names:
        value = getattr(method, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive finite number, got {value}")


METHODS: Registry[type] = Registry("method")
register_objective = METHODS.register
