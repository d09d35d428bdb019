"""How each method is trained on closed-form teachers, once for every test that asks all of them the same question."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fewstep
from fewstep.api import Run
from fewstep.teachers import Teacher
from tests.recovery import OPTIM, QUIET

CALM = OPTIM | {"lr": 1e-3}
SLOW_TIME = frozenset({"tbcm", "scm", "meanflow"})
"""Methods whose student must hear of time in slow waves; see `fewstep.teachers.points.PointNet`."""

RECIPES: dict[str, dict[str, Any]] = {
    "dmd": {"iterations": 600, "batch_size": 128},
    "dmd2": {"iterations": 600, "batch_size": 128},
    "decoupled_dmd": {"iterations": 600, "batch_size": 128, "times": "constrained"},
    "phased_dmd": {"iterations": 1000, "batch_size": 128},
    "sid": {"iterations": 600, "batch_size": 128, "turns": {"critic_per_generator": 5, "critic_warmup": 1}},
    "swiftbrush": {"iterations": 1500, "batch_size": 128, "turns": {"critic_per_generator": 5}, "optim": CALM},
    "boot": {"iterations": 500, "batch_size": 64, "step": 0.04},
    "tbcm": {"iterations": 500, "batch_size": 16, "grid_steps": 16, "warmup": 60, "optim": CALM},
    "scm": {"iterations": 500, "batch_size": 192, "warmup": 60, "optim": CALM},
    # The exact teacher's targets hold no noise, so that the paper's weight would drown the long ways in the instants;
    # and its law of times hardly ever sees pure noise.  With both, one step's spread was 4% of the data's after 500
    # iterations (seed 0, 20,000 samples); with these 96% after 1500.
    "meanflow": {
        "iterations": 1800,
        "batch_size": 128,
        "instant": 0.25,
        "power": 0.0,
        "time_mean": 1.0,
        "time_std": 2.0,
        "derivative": "central",
        "optim": CALM,
    },
    "tmd": {
        "iterations": 1200,
        "batch_size": 128,
        "head_blocks": 1,
        "gate": 0.0,
        "pretraining": 0.3,
        "gan_weight": 0.0,
        "shift": 1.0,
        "student_shift": 1.0,
        "jvp": "central",
        "jvp_step": 2e-3,
        "turns": {"critic_per_generator": 3, "exclusive": False},
    },
}
STEPS = {"phased_dmd": 2}
"""Of a method that has no single step."""


def distilled(teacher: Teacher, method: str, out: Path, *, guidance: float = 1.0, **changes: Any) -> Run:
    """One run of a method's recipe.  changes: settings of the method or of training that differ from it."""
    told = RECIPES[method] | {"num_steps": STEPS.get(method, 1), "guidance": guidance} | changes
    optim, train = told.pop("optim", OPTIM), told.pop("train", {})
    if method == "dmd":
        pairs = out.parent / "pairs"
        fewstep.make_pairs(teacher, pairs, 1000, num_steps=25, guidance=guidance)
        told["pairs"] = str(pairs)
    if method == "tmd":
        told["pretraining_guidance"] = guidance
    critic = {"critic": optim} if method not in SLOW_TIME | {"boot"} else {}
    settings = {"generator": optim, **critic, "ema": 0.98, **QUIET, **train}
    return fewstep.distill(teacher, method, out=out, train=settings, **told)
