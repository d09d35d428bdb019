"""What the figures of a run say, in plain sentences: whether it works, and when to stop.

Losses of distribution matching and of score identity hardly tell (a loss of 0 may be a perfect or a dead student); what
tells is the running metric, the samples' own moments, and how hard each part pulls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RISES = 3
"""Evaluations in a row without a new best after which it is said."""
DRIFT = 0.15
"""Share by which the spread of samples may differ from that at the best evaluation."""
GROWTH = 4.0
"""Times that a derivative or gap may grow from its level in the first tenth."""
DROWNED = 0.01
"""Share of the gradient at the student's samples below which a term of the loss says next to nothing."""
UNWEIGHTED = ("dm", "sid", "vsd")
"""Terms whose weight is 1, so that the others' are told by them."""
CHANCE, EASY = 2 * math.log(2), 0.3
"""A discriminator's loss that tells nothing apart [2 log 2: softplus(0) twice], and one that has won."""

Rows = Sequence[Mapping[str, Any]]


def advice(rows: Rows, train: Mapping[str, Any]) -> dict[str, str]:
    """What a run's rows of metrics.jsonl say, by the rule that says it, the most urgent first; none if all is well.

    train: the run's resolved settings of training.
    """
    found = {name: rule(rows, train) for name, rule in RULES.items()}
    return {name: sentence for name, sentence in found.items() if sentence}


def _values(rows: Rows, name: str) -> list[tuple[int, float]]:
    return [(row["iteration"], float(row[name])) for row in rows if name in row]


def _mean(values: Sequence[tuple[int, float]]) -> float:
    return sum(value for _, value in values) / len(values)


def _last(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The last tenth, of five at the least."""
    return list(values[-max(5, len(values) // 10) :])


def _first(values: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return list(values[: max(5, len(values) // 10)])


def ranking(rows: Rows) -> str | None:
    """The figure that ranks checkpoints, lower is better: the first of an evaluation; None before there was one."""
    return next((name for row in rows for name in row if name.startswith("eval/")), None)


def _skipped(rows: Rows, train: Mapping[str, Any]) -> str | None:
    skipped = rows[-1].get("skipped", 0) if rows else 0
    updates = max(1, rows[-1]["iteration"]) if rows else 1
    if skipped < max(3, updates // 100):
        return None
    return (
        f"{skipped} updates were skipped because a gradient was not finite: lower the learning rate, or take "
        "--precision fp32 or bf16."
    )


def _rising(rows: Rows, train: Mapping[str, Any]) -> str | None:
    name = ranking(rows)
    if name is None:
        return None
    values = _values(rows, name)
    at, best = min(values, key=lambda pair: pair[1])
    since = [value for iteration, value in values if iteration > at]
    if len(since) < RISES:
        return None
    return (
        f"{name.removeprefix('eval/')} has not fallen below its best, {best:.4g} at iteration {at}, in the "
        f"{len(since)} evaluations since (now {since[-1]:.4g}): the best checkpoint is kept, and more iterations at "
        "this rate will hardly help; lower the rates or stop."
    )


def _unmeasured(rows: Rows, train: Mapping[str, Any]) -> str | None:
    if not rows or rows[-1]["iteration"] <= train.get("evaluate_every", math.inf) or ranking(rows) is not None:
        return None
    return "This teacher brings no metric, so only the pictures tell how good the student is."


def _drift(rows: Rows, train: Mapping[str, Any]) -> str | None:
    """Contrast of samples, against that when the metric was best, or else at the middle of the run."""
    values, name = _values(rows, "x/std"), ranking(rows)
    if len(values) < 20:
        return None
    measured = _values(rows, name) if name is not None else []
    at = min(measured, key=lambda pair: pair[1])[0] if measured else values[len(values) // 2][0]
    around = sorted(values, key=lambda pair: abs(pair[0] - at))[:5]
    then, now = _mean(around), _mean(_last(values))
    if abs(now / then - 1) < DRIFT:
        return None
    word = "more" if now > then else "less"
    return (
        f"Samples have {word} contrast than when they were best (spread {now:.3g}, then {then:.3g} at iteration {at}): "
        + (
            "too much guidance or too few updates of the fake score make"
            if now > then
            else "a lagging fake score makes"
        )
        + " it drift so; lower method.guidance or raise method.turns.critic_per_generator."
    )


def _growing(rows: Rows, train: Mapping[str, Any]) -> str | None:
    """A student's derivative along the path: where it grows, its targets are made of it and run away."""
    for name in ("meanflow/du_rms", "g/jvp", "tm/moving"):
        values = _values(rows, name)
        if len(values) < 20:
            continue
        then, now = _mean(_first(values)), _mean(_last(values))
        if now > GROWTH * then:
            return (
                f"{name}, what the student's own derivative adds to its target, has grown from {then:.3g} to "
                f"{now:.3g}: training feeds on it; lower the rate or weigh large errors down (method.power=1 for "
                "meanflow)."
            )
    return None


def _gap(rows: Rows, train: Mapping[str, Any]) -> str | None:
    """The scores' difference at the student's samples: it ends in the lag of the fake score and never vanishes."""
    for name in ("dm/gap_rms", "sid/gap_rms"):
        values = _values(rows, name)
        if len(values) < 20:
            continue
        then, now = _mean(_first(values)), _mean(_last(values))
        if now > 1.5 * then:
            return (
                f"{name}, between the fake and the real score, has grown from {then:.3g} to {now:.3g}: the fake score "
                "lags behind the student; raise method.turns.critic_per_generator or the critic's rate, or lower the "
                "generator's."
            )
    return None


def _discriminator(rows: Rows, train: Mapping[str, Any]) -> str | None:
    values = _values(rows, "gan/critic")
    if len(values) < 20:
        return None
    now = _mean(_last(values))
    if now < EASY:
        return (
            f"The discriminator tells real from fake nearly always (its loss is {now:.3g}, {CHANCE:.3g} is chance): "
            "its gradient says little more; lower method.gan_weight or its rate."
        )
    if now > 0.995 * CHANCE and min(value for _, value in values) > 0.99 * CHANCE:
        return (
            f"The discriminator has told nothing apart from the start (its loss is {now:.3g}, chance is {CHANCE:.3g}): "
            "the GAN term does nothing yet."
        )
    return None


def _drowned(rows: Rows, train: Mapping[str, Any]) -> str | None:
    """A term of the student's loss whose gradient is next to nothing beside the others' (`objectives.terms.shares`)."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("grad/"))
    shares = {name.removeprefix("grad/"): _values(rows, name) for name in names}
    late = {term: _last(values) for term, values in shares.items() if len(values) >= 20}
    for term, values in late.items():
        most = max(share for _, share in values)
        if not 0 < most < DROWNED:  # exactly 0 is a hinge that is satisfied
            continue
        loudest = max(late, key=lambda other: _mean(late[other]))
        remedy = f"lower {_weight(loudest)}" if term in UNWEIGHTED else f"raise {_weight(term)}, or leave the term out"
        return (
            f"{term} gives {most:.2%} of the gradient at the student's samples or less, {loudest} "
            f"{_mean(late[loudest]):.1%}: one term of the loss drowns the other; {remedy}."
        )
    return None


def _weight(term: str) -> str:
    """The setting that weighs a term of the student's loss; that of guidance is the scale itself."""
    return "method.guidance" if term == "ca" else f"method.{term}_weight"


def _clipped(rows: Rows, train: Mapping[str, Any]) -> str | None:
    for player in ("generator", "critic"):
        clip = train.get(player, {}).get("clip")
        values = _values(rows, f"{player}/grad_norm")
        if clip is None or len(values) < 20:
            continue
        norms = sorted(value for _, value in _last(values))
        if norms[0] > clip:
            return (
                f"Every late gradient of the {player} is clipped (norms of {norms[0]:.3g} and more, "
                f"train.{player}.clip is {clip:g}): large errors alone decide where it goes; give a weight that bounds "
                "them, or raise it."
            )
    return None


RULES: dict[str, Callable[[Rows, Mapping[str, Any]], str | None]] = {
    "skipped": _skipped,
    "unmeasured": _unmeasured,
    "rising": _rising,
    "drift": _drift,
    "derivative": _growing,
    "lag": _gap,
    "discriminator": _discriminator,
    "drowned": _drowned,
    "clip": _clipped,
}
