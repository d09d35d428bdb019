"""The student of a run folder, loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from fewstep.config import RunConfig, resolve
from fewstep.environment import device_of
from fewstep.models.adapters import LoRA
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Sharing, Trio
from fewstep.objectives.base import student_of
from fewstep.rng import key
from fewstep.sampling import Student
from fewstep.teachers.base import Teacher
from fewstep.teachers.pipelines import load_teacher
from fewstep.training import checkpoint
from fewstep.training.checkpoint import CONFIG
from fewstep.training.prompts import copy_in, read_prompts
from fewstep.types import Role


def load_student(
    folder: str | Path,
    *,
    which: Literal["best", "last"] = "best",
    teacher: Teacher | None = None,
    device: str = "auto",
) -> Student:
    """The student of a run folder: its averaged weights at the best (by the running figure) or last checkpoint.

    device: where it makes images: cpu, cuda, or auto = cuda if there is one.  Raises FileNotFoundError if there is no
    run or no valid checkpoint, ValueError if the wanted one is damaged or there is no such device.
    """
    folder = Path(folder)
    student = untrained_student(folder, teacher=teacher, device=device)
    saved = _saved(folder, which, student.teacher)
    student.denoiser.load(_merged(student, folder, saved.tensors["ema"]))
    return replace(student, iteration=saved.state["progress"]["iteration"])


def load_adapter(
    folder: str | Path, teacher: Teacher, which: Literal["best", "last"] = "best"
) -> tuple[dict[str, Tensor], LoRA]:
    """The averaged adapter of a run whose student is one, by peft's names, and its rank and scale.

    teacher: the run's.  Raises ValueError if the student is a full network, else as `load_student`.
    """
    config = resolve(config=Path(folder) / CONFIG)
    if config.train.sharing != "lora":
        raise ValueError(
            f"the student of {folder} is a full network (sharing {config.train.sharing!r}), not an adapter; export it "
            "as a pipeline, or distil with --sharing lora"
        )
    return dict(_saved(Path(folder), which, teacher).tensors["ema"]), config.train.lora


def _saved(folder: Path, which: Literal["best", "last"], teacher: Teacher) -> checkpoint.Checkpoint:
    newest = checkpoint.newest_valid(folder, only="ema")
    if newest is None:
        raise FileNotFoundError(f"no valid checkpoint in {folder / 'checkpoints'}")
    saved = checkpoint.read(newest, only="ema")
    best = saved.state["progress"]["best"]
    if which == "best" and best is not None and best["iteration"] != saved.state["progress"]["iteration"]:
        saved = checkpoint.read(checkpoint.folder_of(folder, int(best["iteration"])), only="ema")
    if saved.state["teacher"] != checkpoint.fingerprint(teacher.denoiser):
        raise ValueError(f"{folder} was distilled from other weights than those of {teacher.card.name!r} now")
    return saved


def untrained_student(folder: str | Path, *, teacher: Teacher | None = None, device: str = "auto") -> Student:
    """The student of a run folder as it was before training: the teacher's weights in the student's sampler."""
    place = device_of(device)
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"no run at {folder}: {CONFIG} is missing; `fewstep list runs` names the runs in runs/")
    config = resolve(config=Path(folder) / CONFIG)
    teacher = teacher or load_teacher(config.teacher, **config.teacher_options)
    if config.negative_prompt is not None:
        teacher = teacher.against(config.negative_prompt)
    files = [copy_in(Path(folder)), Path(config.prompts)] if config.prompts else []  # the run's copy first
    if found := [path for path in files if path is not None and path.exists()]:
        teacher = teacher.showing(read_prompts(found[0]))
    denoiser = _generator(config, teacher)
    return Student(denoiser.to(place).eval().requires_grad_(False), teacher, config.objective.sampler)


def _merged(student: Student, folder: Path, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The student's full weights from what its run saved of it: all of them, or an adapter to the teacher's."""
    config = resolve(config=folder / CONFIG)
    if config.train.sharing != "lora":
        return state
    adapted = _generator(config, student.teacher, "lora")
    adapted.load(state)
    return {name: value.clone() for name, value in adapted.merged_state().items()}


def _generator(config: RunConfig, teacher: Teacher, sharing: Sharing = "copies") -> Denoiser:
    """The run's generator as it was before training, on the CPU or where the teacher is."""
    made = student_of(config.objective, key(config.train.seed, "own"))
    none, lora = frozenset[Role](), config.train.lora
    return Trio.build(teacher.denoiser, none, sharing=sharing, lora=lora, init=teacher.student, student=made).generator
