"""VBench's sixteen dimensions put together as on its leaderboard (arXiv:2311.17982, its scripts/constant.py)."""

from __future__ import annotations

from collections.abc import Mapping

RANGES = {
    "subject consistency": (0.1462, 1.0),
    "background consistency": (0.2615, 1.0),
    "temporal flickering": (0.6293, 1.0),
    "motion smoothness": (0.706, 0.9975),
    "dynamic degree": (0.0, 1.0),
    "aesthetic quality": (0.0, 1.0),
    "imaging quality": (0.0, 1.0),
    "object class": (0.0, 1.0),
    "multiple objects": (0.0, 1.0),
    "human action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance style": (0.0009, 0.2855),
    "temporal style": (0.0, 0.364),
    "overall consistency": (0.0, 0.364),
}
"""Which raw scores become 0 and 1.  The first seven dimensions are of quality, the other nine of meaning."""
QUALITY, SEMANTIC = tuple(RANGES)[:7], tuple(RANGES)[7:]
WEIGHTS = {"dynamic degree": 0.5}
"""Of a dimension within its part; 1 for all others."""
QUALITY_WEIGHT = 4.0
"""Of the part in the total; 1 for the semantic part."""


def vbench(dimensions: Mapping[str, float]) -> dict[str, float]:
    """Total, quality and semantic score, in percent.

    Each part is the weighted mean of (score - lowest) / (highest - lowest) over its dimensions, not clipped;
    total = (4 quality + semantic) / 5.

    dimensions: raw scores, most of them in [0, 1].  Raises ValueError unless they are exactly the sixteen: a missing
    one that counted as 0 would be a figure of nothing.
    """
    if missing := [name for name in RANGES if name not in dimensions]:
        raise ValueError(f"VBench needs all {len(RANGES)} dimensions; {', '.join(missing)} missing")
    if unknown := sorted(set(dimensions) - set(RANGES)):
        raise ValueError(f"VBench has no dimension {', '.join(unknown)}; it has {', '.join(RANGES)}")
    quality, semantic = (_part(dimensions, names) for names in (QUALITY, SEMANTIC))
    total = (QUALITY_WEIGHT * quality + semantic) / (QUALITY_WEIGHT + 1)
    return {"total": 100 * total, "quality": 100 * quality, "semantic": 100 * semantic}


def _part(dimensions: Mapping[str, float], names: tuple[str, ...]) -> float:
    weights = [WEIGHTS.get(name, 1.0) for name in names]
    scaled = [(dimensions[name] - RANGES[name][0]) / (RANGES[name][1] - RANGES[name][0]) for name in names]
    return sum(w * s for w, s in zip(weights, scaled)) / sum(weights)
