"""Claims about VBench's aggregation: published rows come out, and nothing is made of what is not there."""

import pytest

from fewstep.metrics.vbench import QUALITY, RANGES, SEMANTIC, WEIGHTS, vbench

PUBLISHED = {
    "AccVideo-HunyuanT2V, arXiv:2503.19462": (
        (83.26, 84.58, 77.96),
        (94.46, 97.45, 99.18, 98.79, 75.00, 62.08, 65.64),
        (92.99, 67.33, 95.60, 94.11, 75.70, 54.72, 19.87, 23.71, 27.21),
    ),
    "CogVideoX-5B, as in arXiv:2502.05179": (
        (81.61, 82.75, 77.04),
        (96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90),
        (85.23, 62.11, 99.40, 82.81, 66.35, 53.20, 24.91, 25.38, 27.59),
    ),
    "CogVideoX-1.5, as in arXiv:2502.05179": (
        (82.17, 82.78, 79.76),
        (96.87, 97.35, 98.88, 98.31, 50.93, 62.79, 65.02),
        (87.47, 69.65, 97.20, 87.55, 80.25, 52.91, 24.89, 25.19, 27.30),
    ),
}
"""Total, quality and semantic score; the raw dimensions of quality and of meaning, in RANGES' order.  In percent."""


def row(quality, semantic) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(RANGES, (*quality, *semantic))}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_rows_come_out(name):
    """Within .01, since their inputs are rounded to .01. Mutations: any constant; dynamic degree with weight 1."""
    (total, quality, semantic), *raw = PUBLISHED[name]
    found = vbench(row(*raw))
    assert found == pytest.approx({"total": total, "quality": quality, "semantic": semantic}, abs=0.0101)


def test_quality_counts_four_times():
    """A published row of three-digit parts: 84.72 of 85.86 and 80.15 (FastGen's four-step student of Wan)."""
    low, width = {name: low for name, (low, _) in RANGES.items()}, {n: high - low for n, (low, high) in RANGES.items()}
    parts = {name: 0.8586 for name in QUALITY} | {name: 0.8015 for name in SEMANTIC}
    found = vbench({name: low[name] + parts[name] * width[name] for name in RANGES})
    assert found["quality"] == pytest.approx(85.86) and found["semantic"] == pytest.approx(80.15)
    assert found["total"] == pytest.approx(84.72, abs=0.005)


@pytest.mark.parametrize("name", RANGES)
def test_each_dimension_moves_its_part_alone(name):
    """From its lowest to its highest value by weight / sum of weights: 6.5 of quality, 9 of meaning."""
    zero = {name: low for name, (low, _) in RANGES.items()}
    found = vbench(zero | {name: RANGES[name][1]})
    part, other, weights = ("quality", "semantic", 6.5) if name in QUALITY else ("semantic", "quality", 9)
    assert found[part] == pytest.approx(100 * WEIGHTS.get(name, 1) / weights) and found[other] == 0
    assert (len(QUALITY), len(SEMANTIC)) == (7, 9) and WEIGHTS["dynamic degree"] == 0.5


def test_missing_dimensions_are_refused_by_name():
    """Mutation: zeros in their place."""
    dimensions = {name: 0.5 for name in RANGES if name not in ("scene", "color")}
    with pytest.raises(ValueError, match="all 16 dimensions; color, scene missing"):
        vbench(dimensions)
    with pytest.raises(ValueError, match="no dimension sound; it has subject consistency"):
        vbench({name: 0.5 for name in RANGES} | {"sound": 1.0})
