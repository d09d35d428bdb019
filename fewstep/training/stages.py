"""Which stage of its method an iteration belongs to."""

from __future__ import annotations

from itertools import accumulate

from fewstep.objectives.base import Objective, Stage, stages_of
from fewstep.types import Turn


class Stages:
    """The stages of a method over a run's iterations: a pure function, so there is no position to lose.

    Raises ValueError if a stage is left without an iteration.
    """

    def __init__(self, method: Objective, iterations: int) -> None:
        self.stages: tuple[Stage, ...] = stages_of(method)
        whole = sum(stage.share for stage in self.stages)
        self.ends = tuple(round(iterations * done / whole) for done in accumulate(s.share for s in self.stages))
        self.starts = (0, *self.ends[:-1])
        if any(start >= end for start, end in zip(self.starts, self.ends, strict=True)) and len(self.stages) > 1:
            raise ValueError(
                f"iterations = {iterations} leave one of the {len(self.stages)} stages of this method empty; they end "
                f"after {', '.join(map(str, self.ends))}; give more --iterations"
            )

    def __len__(self) -> int:
        return len(self.stages)

    def __getitem__(self, stage: int) -> Objective:
        return self.stages[stage].objective

    def at(self, iteration: int) -> int:
        """The stage that an iteration (counted from 0) belongs to; after the end, the last."""
        return next((k for k, end in enumerate(self.ends) if iteration < end), len(self.ends) - 1)

    def rate(self, stage: int) -> float:
        """What a stage multiplies the learning rates by."""
        return self.stages[stage].rate

    def planned(self, stage: int, turn: Turn) -> int:
        """How many updates a player makes in a stage."""
        return sum(turn in self[stage].turns.at(i) for i in range(self.ends[stage] - self.starts[stage]))
