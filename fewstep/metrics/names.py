"""How figures are called in tables, and which way is better."""

from __future__ import annotations

from typing import Literal

TITLES = {"fmd": "FMD", "fmd_test": "FMD to test images", "clip_score": "CLIP score"}
"""Where they are not the keys themselves."""
LOWER = frozenset({"fmd", "fmd_test", "kmd", "kmd_full", "sw", "fd"})
HIGHER = frozenset({"precision", "recall", "density", "coverage", "clip_score", "agreement", "modes", "inside"})


def title(name: str) -> str:
    """The figure's name in tables."""
    return TITLES.get(name, name)


def better(name: str) -> Literal["lower", "higher"] | None:
    """Which way it is better, if one is."""
    return "lower" if name in LOWER else "higher" if name in HIGHER else None
