"""Losses of pictures in whole runs on an embedded teacher, an iteration each: they are loaded and reach the loss."""

import json

import pytest

import fewstep
from fewstep.api import load_teacher, make_pairs

TRAIN = {"device": "cpu", "evaluate_samples": 4}


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("fashion-dit")


def logged(teacher, out, method, **options):
    fewstep.distill(teacher, method, iterations=1, batch_size=2, out=out, train=TRAIN, guidance=1.5, **options)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {name: value for row in rows for name, value in row.items()}


def test_dmd_compares_pairs_by_the_vaes_features(teacher, tmp_path):
    make_pairs(teacher, tmp_path / "pairs", 4, num_steps=2, guidance=1.5)
    found = logged(teacher, tmp_path / "run", "dmd", distance="lpips", pairs=str(tmp_path / "pairs"))
    assert 0 < found["regression"] < 12 and found["generator/grad_norm"] > 0  # three layers, each at most 4


def test_swiftbrush_asks_the_teachers_clip(teacher, tmp_path):
    found = logged(teacher, tmp_path / "run", "swiftbrush", clip_weight=0.1, clip_margin=0.9)
    assert -1 <= found["clip/cosine"] <= 1 and found["generator/grad_norm"] > 0


def test_tbcm_filters_black_pictures(teacher, tmp_path):
    found = logged(teacher, tmp_path / "run", "tbcm", black_filter=True, grid_steps=3, trajectory_pairs=2)
    assert found["generator/grad_norm"] > 0
