"""fewstep: turn a slow diffusion model into a 1-8 step generator.

    teacher = fewstep.load_teacher("fashion-dit")
    run = fewstep.distill(teacher, method="dmd2", num_steps=1, iterations=600, out="runs/demo")
    images = run.student.sample(16)

Names are loaded on first use: importing the package costs nothing, and the command line needs no torch for --help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Run": "fewstep.api",
    "Student": "fewstep.sampling",
    "distill": "fewstep.api",
    "load_plugin": "fewstep.registry",
    "load_student": "fewstep.api",
    "load_teacher": "fewstep.api",
    "make_pairs": "fewstep.training.pairs",
    "register_objective": "fewstep.objectives.base",
    "register_teacher": "fewstep.teachers.base",
}
_MODULES = ("diffusion", "metrics", "models", "objectives", "teachers", "training")

__all__ = [
    "Run",
    "Student",
    "__version__",
    "diffusion",
    "distill",
    "load_plugin",
    "load_student",
    "load_teacher",
    "make_pairs",
    "metrics",
    "models",
    "objectives",
    "register_objective",
    "register_teacher",
    "teachers",
    "training",
]

if TYPE_CHECKING:
    from fewstep import diffusion, metrics, models, objectives, teachers, training
    from fewstep.api import Run, distill, load_student, load_teacher
    from fewstep.objectives.base import register_objective
    from fewstep.registry import load_plugin
    from fewstep.sampling import Student
    from fewstep.teachers.base import register_teacher
    from fewstep.training.pairs import make_pairs


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(_WHERE[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
