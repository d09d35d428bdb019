"""What is planned against what a process on the CPU takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.config import resolve
from fewstep.planning.plan import plan

ROOT = Path(__file__).resolve().parents[2]
ALWAYS = {"turns": {"critic_per_generator": 1}, "num_steps": 1}
CASES = [
    ("fashion-dit", "copies", "dmd2", ALWAYS),
    ("fashion-dit", "lora", "dmd2", ALWAYS),
    ("fashion-dit", "lora-fake", "sid", ALWAYS | {"turns": {"critic_warmup": 1}}),
    ("fashion-unet", "copies", "sid", ALWAYS | {"turns": {"critic_warmup": 1}}),
    ("fashion-unet", "lora", "dmd2", ALWAYS),
    ("fashion-dit", "copies", "tbcm", {"num_steps": 1, "grid_steps": 4, "trajectory_pairs": 2}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "sharing", "method", "settings"), CASES)
def test_planned_peak_is_the_real_one_within_a_tenth(teacher, sharing, method, settings, tmp_path):
    """By the allocator's events, and by the resident set, of an iteration of both turns.

    A batch of 256 makes activations hundreds of MiB, beside which a library's code that is first read does not count.
    """
    train = {"batch_size": 256, "sharing": sharing, "precision": "fp32", "ema": 0.9, "iterations": 100}
    layers = {"teacher": {"name": teacher}, "method": {"name": method, **settings}, "train": train}
    config = resolve(given=layers)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(config.to_yaml())
    made = plan(config, device="cpu").peak
    allocated, resident = measured(recipe)
    print(
        f"{teacher} {sharing} {method}: planned {made / 2**20:.0f} MiB, allocated {allocated / 2**20:.0f}, "
        f"resident {resident / 2**20:.0f}"
    )
    assert made == pytest.approx(allocated, rel=0.1)
    assert made == pytest.approx(resident, rel=0.1)


def measured(recipe: Path) -> list[int]:
    """Of a child process, whose allocator gives back what it can: see `planned`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.invariants.planned", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
