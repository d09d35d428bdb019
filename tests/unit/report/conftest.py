"""A run's folder as training and `fewstep eval` leave it, made without training."""

import json
import math

import pytest
import yaml
from PIL import Image


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, iterations=..., done=..., ...) -> the folder: a grid every 100 iterations, figures every 10."""

    def make(name="demo", *, iterations=600, done=600, method="dmd2", lr=1e-4, every=100, evaluated=True, rows=None):
        folder = tmp_path / name
        (folder / "previews").mkdir(parents=True)
        config = {
            "teacher": {"name": "fashion-dit"},
            "method": {"name": method, "num_steps": 1, "guidance": 1.2},
            "train": {
                "iterations": iterations,
                "evaluate_every": every,
                "generator": {"lr": lr, "clip": 10.0},
                "critic": {"lr": lr, "clip": 10.0},
            },
            "prompts": "<b>bold</b> & co.txt",
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        environment = {"python": "3.11.7", "packages": {"torch": "2.14.1"}, "threads": 1, "revision": "0" * 40}
        (folder / "environment.json").write_text(json.dumps(environment))
        lines = rows if rows is not None else list(figures(done, every))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for number, iteration in enumerate(range(every, done + 1, every)):
            Image.new("RGB", (66, 40), (40 * number % 256, 0, 255)).save(folder / f"previews/{iteration:08d}.png")
        if evaluated:
            measured = {"rows": ROWS, "protocol_hash": "a" * 64, "which": "best", "iteration": done}
            (folder / "eval.json").write_text(json.dumps(measured))
        return folder

    return make


def figures(done, every):
    """Of a run in which nothing is wrong."""
    for iteration in range(10, done + 1, 10):
        row = {"iteration": iteration, "seconds": iteration / 2, "dm": math.exp(-iteration / 300), "skipped": 0}
        row |= {"critic": 0.2, "dm/gap_rms": 0.1, "dm/weight": 4.0}
        yield row | {"x/std": 1.0, "generator/grad_norm": 0.5, "generator_updates": iteration}
        if iteration % every == 0:
            yield {"iteration": iteration, "seconds": iteration / 2, "eval/fmd@1000": 2 - iteration / 1000}


def _row(model, fmd, *, stored=False, steps=1):
    told = {"model": model, "steps": steps, "n": 10_000, "seed": 5, "guidance": None, "stored": stored, "seeds": 1}
    return told | {"figures": {"fmd": fmd, "recall": 0.8, "nearest": 3.0}, "spread": None}


ROWS = [_row("teacher", 1.485, stored=True, steps=50), _row("student", 1.425)]
