"""What a run counts, and the two ways in which it stops early."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fewstep.types import Turn

PATIENCE = 20
"""Skipped steps of one player in a row after which a run stops: by then the weights do not recover by themselves."""


class Diverged(RuntimeError):
    """The run stopped because its gradients stayed non-finite."""


class Interrupted(RuntimeError):
    """A signal asked the run to stop; everything is saved.  `signum` is that signal."""

    def __init__(self, signum: int, saved: Path) -> None:
        super().__init__(f"stopped by signal {signum}; saved {saved}; go on with --resume")
        self.signum = signum


@dataclass
class Progress:
    """What a run has counted; all of it is in the checkpoint."""

    iteration: int = 0
    updates: dict[str, int] = field(default_factory=lambda: {"generator": 0, "critic": 0})
    stage: int = 0
    before: dict[str, int] = field(default_factory=lambda: {"generator": 0, "critic": 0})  # updates of earlier stages
    skipped: int = 0
    # By player: the critic's good steps must not hide a generator that never moves again.
    skipped_in_a_row: dict[str, int] = field(default_factory=lambda: {"generator": 0, "critic": 0})
    seconds: float = 0.0
    best: dict[str, float] | None = None

    def enter(self, stage: int) -> None:
        """A stage begins: rates count from here, and the best student of another stage is no measure."""
        self.stage, self.before, self.best = stage, dict(self.updates), None

    def updated(self, turn: Turn) -> None:
        """This player made a step."""
        self.updates[turn] += 1
        self.skipped_in_a_row[turn] = 0

    def skip(self, turn: Turn) -> str:
        """This player's gradient was not finite.  Returns what to tell the user."""
        self.skipped += 1
        self.skipped_in_a_row[turn] += 1
        return (
            f"iteration {self.iteration}: the {turn}'s gradient is not finite; step skipped "
            f"({self.skipped_in_a_row[turn]} in a row, {self.skipped} in all)"
        )

    def is_best(self, rank: float | None) -> bool:
        """Whether a figure is the lowest so far; one that is not a number never is."""
        return rank is not None and rank < (self.best["rank"] if self.best else float("inf"))
