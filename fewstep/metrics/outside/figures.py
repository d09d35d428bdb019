"""From an adapter's scores to what a benchmark publishes: which mean over which pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fewstep.metrics.means import Mean, mean_by_prompt, over_parts
from fewstep.metrics.outside.contract import Answer, Item
from fewstep.metrics.vbench import vbench

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""GenEval's, by their tags."""
STYLES = ("anime", "concept-art", "paintings", "photo")
"""HPSv2's, by the names of its files and folders."""
HPS_SCALE = 100.0
"""Published values are 100 cos; the package answers cos."""
UNSEEN = 85 * 5
"""Videos of VBench's color prompts: those alone may have no score, where the package finds no object to have one."""


def hpsv2(title: str, items: Sequence[Item], answer: Answer) -> dict[str, Mean]:
    """Mean over all pictures and over those of each style, times 100; the styles are fixed parts of the whole."""
    groups = _by(items, "style")
    means = {style: _mean(group, answer, HPS_SCALE) for style, group in groups.items()}
    whole = over_parts(list(means.values()), [len(group) for group in groups.values()])
    return {title: whole} | {f"{title} {style}": mean for style, mean in means.items() if style}


def imagereward(title: str, items: Sequence[Item], answer: Answer) -> dict[str, Mean]:
    """Mean over all pictures."""
    return {title: _mean(items, answer)}


def geneval(title: str, items: Sequence[Item], answer: Answer) -> dict[str, Mean]:
    """Mean of the six tasks' accuracies, and each of these: shares of pictures that are correct, in [0, 1].

    Raises ValueError for a task without pictures, and for a score that is neither 0 nor 1.
    """
    if odd := [file for file, score in answer.scores.items() if score not in (0.0, 1.0)]:
        raise ValueError(f"{title}: a picture is correct (1) or not (0), and {odd[0]!r} has {answer.scores[odd[0]]!r}")
    groups = _by(items, "tag")
    if missing := [task for task in TASKS if task not in groups]:
        raise ValueError(f"{title} is the mean of six tasks; no picture of {', '.join(missing)}")
    if unknown := sorted(set(groups) - set(TASKS)):
        raise ValueError(f"{title} has no task {', '.join(unknown)}; it has {', '.join(TASKS)}")
    means = {task: _mean(groups[task], answer) for task in TASKS}
    whole = over_parts(list(means.values()), [1.0] * len(TASKS))
    return {title: whole} | {f"{title} {task}": mean for task, mean in means.items()}


def vbench_figures(title: str, items: Sequence[Item], answer: Answer) -> dict[str, Mean]:
    """Total, quality, semantic and the sixteen raw dimensions, in percent; the package makes these of its frames.

    Raises ValueError for a missing dimension, and for more videos without any score than the package may leave out.
    """
    if (without := sum(not score for score in answer.scores.values())) > UNSEEN:
        raise ValueError(f"{title} scored {len(items) - without} of {len(items)} videos; are these their results?")
    dimensions = {name.replace("_", " "): value for name, value in answer.figures.items()}
    parts = vbench(dimensions)
    named = {title: parts.pop("total")} | {f"{title} {part}": value for part, value in parts.items()}
    named |= {f"{title} {name}": 100 * value for name, value in dimensions.items()}
    return {name: Mean(value, None) for name, value in named.items()}


def plain(title: str, items: Sequence[Item], answer: Answer) -> dict[str, Mean]:
    """Of a user's own adapter: the mean of its scores, of each name if they have some, and the figures that it gave.

    A figure stands in place of the mean of scores of its name.
    Raises ValueError if nothing was scored.
    """
    given = {f"{title} {name}": Mean(value, None) for name, value in answer.figures.items()}
    scores = {item.file: answer.scores[item.file] for item in items}
    values = {file: score if isinstance(score, Mapping) else {"": score} for file, score in scores.items()}
    found = {}
    for name in dict.fromkeys(name for named in values.values() for name in named):
        own = [(values[item.file][name], item.prompt) for item in items if name in values[item.file]]
        found[f"{title} {name}".strip()] = mean_by_prompt(*zip(*own))
    if not found and not given:
        raise ValueError(f"{title} gave neither scores nor figures")
    return found | given


def _by(items: Sequence[Item], key: str) -> dict[str, list[Item]]:
    """Items by what their benchmark says of them, "" where it says nothing."""
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(str(item.extra.get(key, "")), []).append(item)
    return groups


def _mean(items: Sequence[Item], answer: Answer, scale: float = 1.0) -> Mean:
    """Raises ValueError for scores with names, which a benchmark of one score has not."""
    scores = []
    for item in items:
        score = answer.scores[item.file]
        if isinstance(score, Mapping):
            raise ValueError(f"one number is wanted for {item.file!r}, not {', '.join(score) or 'an empty object'}")
        scores.append(scale * score)
    mean = mean_by_prompt(scores, [item.prompt for item in items])
    assert math.isfinite(mean.value)
    return mean
