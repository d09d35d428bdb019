"""The Python way in: load a teacher, distil it, load and sample the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fewstep.config import RunConfig, resolve
from fewstep.sampling import Student
from fewstep.students import load_student
from fewstep.teachers.base import Teacher
from fewstep.teachers.pipelines import load_teacher
from fewstep.training.launch import prepare
from fewstep.training.pairs import make_pairs
from fewstep.training.trainer import Progress

__all__ = ["Run", "distill", "load_student", "load_teacher", "make_pairs", "run"]


@dataclass(frozen=True)
class Run:
    """A finished distillation: its folder, configuration, teacher, student (best checkpoint) and counts."""

    out: Path
    config: RunConfig
    teacher: Teacher
    student: Student
    progress: Progress


def distill(
    teacher: Teacher | str,
    method: str = "dmd2",
    *,
    num_steps: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    train: Mapping[str, Any] | None = None,
    prompts: str | None = None,
    negative_prompt: str | None = None,
    data: str | None = None,
    pairs: str | None = None,
    student: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    **method_options: Any,
) -> Run:
    """Distil a teacher into a few-step student and return the finished run.

    What is not given comes from the packaged recipe of this teacher and method, else from the defaults.
    out: the run folder, by default runs/<teacher>-<method>.  train: further training settings, nested as in the
    configuration file.  prompts: a text file, or one of the other formats of `training.sources`.
    data: captioned pictures for a GAN, a folder or tar shards.
    pairs: a folder that `make_pairs` wrote, for a method that regresses on the teacher's samples.
    student: another run of this teacher, from whose student the generator starts.
    method_options: fields of the method.  Raises ValueError or LookupError for bad values,
    Interrupted or Diverged if the run stops early.
    """
    name = teacher if isinstance(teacher, str) else teacher.card.name
    options = {} if isinstance(teacher, str) else teacher.options
    counts = {"iterations": iterations, "batch_size": batch_size, "seed": seed}
    files = {"prompts": prompts, "data": data, "pairs": pairs, "student": student}
    texts = {**files, "negative_prompt": negative_prompt}
    given = {
        "teacher": {"name": name, **options},
        "method": {"name": method, **({} if num_steps is None else {"num_steps": num_steps}), **method_options},
        "train": {**{k: v for k, v in counts.items() if v is not None}, **(train or {})},
        **{k: v for k, v in texts.items() if v is not None},
    }
    folder = Path(out) if out is not None else default_out(name, method)
    bundle = teacher if isinstance(teacher, Teacher) else None
    return run(resolve(given=given), folder, teacher=bundle, resume=resume, overwrite=overwrite)


def run(
    config: RunConfig,
    out: Path,
    *,
    teacher: Teacher | None = None,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> Run:
    """Run a resolved configuration.  teacher: an already loaded one, else it is loaded by the configuration's name."""
    load = teacher or partial(load_teacher, config.teacher, **config.teacher_options)
    trainer, loaded = prepare(config, out, load, resume=resume, overwrite=overwrite, console=console)
    progress = trainer.run()
    del trainer  # the student needs the room of optimisers and critic
    return Run(out, config, loaded, load_student(out, teacher=loaded, device=config.train.device), progress)


def default_out(teacher: str, method: str) -> Path:
    """Where a run goes if the user names no folder."""
    return Path("runs") / f"{Path(teacher).name}-{method}"
