"""Means of scores with standard errors that take the pictures of one prompt as one draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NORMAL_95 = 1.959964
"""Standard errors to either side that hold 95% of a normal distribution."""


@dataclass(frozen=True)
class Mean:
    """value; error: its standard error, None where fewer than two prompts leave it unknown."""

    value: float
    error: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        """In which the true mean lies with 95% confidence, as for a normal distribution."""
        reach = None if self.error is None else NORMAL_95 * self.error
        return None if reach is None else (self.value - reach, self.value + reach)


def mean_by_prompt(scores: Sequence[float], prompts: Sequence[str]) -> Mean:
    """Mean over all scores, with the error that it has over draws of G prompts.

    error^2 = G / (G - 1) sum over prompts (sum over its scores (score - mean))^2 / N^2, the cluster-robust one; with
    equally many scores of every prompt, the deviation of the prompts' means / sqrt(G).  Scores of one prompt resemble
    each other: an error that took them for independent would be too small.

    scores, prompts: N >= 1, one prompt of each score.
    """
    mean = math.fsum(scores) / len(scores)
    sums: dict[str, float] = {}
    for score, prompt in zip(scores, prompts):
        sums[prompt] = sums.get(prompt, 0.0) + score - mean
    count = len(sums)
    if count < 2:
        return Mean(mean, None)
    return Mean(mean, math.sqrt(count / (count - 1) * math.fsum(s**2 for s in sums.values())) / len(scores))


def over_parts(parts: Sequence[Mean], weights: Sequence[float]) -> Mean:
    """Weighted mean of parts that are fixed, as a benchmark's styles or tasks: their differences are no error.

    error^2 = sum w^2 error^2, with weights that sum to 1.  weights: >= 0, of any sum.
    """
    shares = [weight / math.fsum(weights) for weight in weights]
    errors = [part.error for part in parts]
    known = [error for error in errors if error is not None]
    error = math.hypot(*(w * e for w, e in zip(shares, known))) if len(known) == len(errors) else None
    return Mean(math.fsum(w * part.value for w, part in zip(shares, parts)), error)
