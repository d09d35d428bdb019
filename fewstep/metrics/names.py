"""How figures stand in tables: what they are called, which way is better, and which of a column is best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

UP, DOWN = "↑", "↓"
TITLES = {"fmd": "FMD", "fmd_test": "FMD to test images", "clip_score": "CLIP score"}
"""Where they are not the keys themselves."""
LOWER = frozenset(
    {"fmd", "fmd_test", "kmd", "kmd_full", "sw"}
    | {"FID", "KID", "CMMD", "FD-DINOv2", "KD-DINOv2", "KD-CLIP", "FMD", "KMD", "FD", "KD", "MMD", "fd"}
)
HIGHER = frozenset(
    {"precision", "recall", "density", "coverage", "clip_score", "agreement", "modes", "inside", "IS"}
    | {"CLIP", "CLIP-ViT-g-14", "HPSv2.1", "HPSv2.0", "ImageReward", "GenEval", "VBench"}
)


def title(name: str) -> str:
    """The figure's name in tables."""
    return TITLES.get(name, name)


def better(name: str) -> Literal["lower", "higher"] | None:
    """Which way it is better, if one is; of parts and few samples as of all: GenEval counting, FID@5000, patch FID.

    Those of weights that nobody has verified, too: FD[inception-unverified].
    """
    of_all = re.match(r"(?:patch )?([^@\[ ]+)", name)
    stem = name if of_all is None else of_all[1]
    return "lower" if stem in LOWER else "higher" if stem in HIGHER else None


def heading(name: str) -> str:
    """The figure's name with an arrow where it is better."""
    return title(name) + {"lower": f" {DOWN}", "higher": f" {UP}", None: ""}[better(name)]


def cell(
    name: str,
    figures: Mapping[str, float],
    spread: Mapping[str, float] | None = None,
    least: Mapping[str, float] | None = None,
) -> str:
    """The figure in four digits, its deviation if there is one, and its minimum if that is the best of several.

    "-" where it was not measured.
    """
    if name not in figures:
        return "-"
    said = f"{figures[name]:.4g}" + (f" ± {spread[name]:.2g}" if spread and name in spread else "")
    return said + (f" (min {least[name]:.4g})" if least and name in least and better(name) == "lower" else "")


def best_rows(name: str, rows: Sequence[Mapping[str, float]]) -> list[int]:
    """Which of the rows have the best value; none of a figure that has no better, or is finite in one row alone."""
    have = {row: found[name] for row, found in enumerate(rows) if math.isfinite(found.get(name, math.nan))}
    way = better(name)
    if way is None or len(have) < 2:
        return []
    best = (min if way == "lower" else max)(have.values())
    return [row for row, value in have.items() if value == best]
