"""The Python way in: load a teacher, distil it, load and sample the student."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor

from fewstep.config import RunConfig, resolve
from fewstep.environment import device_of
from fewstep.models.denoiser import Denoiser
from fewstep.models.trio import Sharing, Trio
from fewstep.objectives.base import student_of
from fewstep.rng import key
from fewstep.sampling import Student
from fewstep.teachers.base import Teacher
from fewstep.teachers.pipelines import load_teacher
from fewstep.training import checkpoint
from fewstep.training.launch import CONFIG, PROMPTS, prepare
from fewstep.training.pairs import make_pairs
from fewstep.training.prompts import read_prompts
from fewstep.training.trainer import Progress
from fewstep.types import Role

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
    resume: bool = False,
    overwrite: bool = False,
    **method_options: Any,
) -> Run:
    """Distil a teacher into a few-step student and return the finished run.

    What is not given comes from the packaged recipe of this teacher and method, else from the defaults.
    out: the run folder, by default runs/<teacher>-<method>.  train: further training settings, nested as in the
    configuration file.  prompts: a text file.  data: a folder of captioned pictures, for a GAN.
    pairs: a folder that `make_pairs` wrote, for a method that regresses on the teacher's samples.
    method_options: fields of the method.  Raises ValueError or LookupError for bad values,
    Interrupted or Diverged if the run stops early.
    """
    name = teacher if isinstance(teacher, str) else teacher.card.name
    options = {} if isinstance(teacher, str) else teacher.options
    counts = {"iterations": iterations, "batch_size": batch_size, "seed": seed}
    texts = {"prompts": prompts, "negative_prompt": negative_prompt, "data": data, "pairs": pairs}
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

    def load() -> Teacher:
        return teacher if teacher is not None else load_teacher(config.teacher, **config.teacher_options)

    trainer, loaded = prepare(config, out, load, resume=resume, overwrite=overwrite, console=console)
    progress = trainer.run()
    del trainer  # the student needs the room of optimisers and critic
    return Run(out, config, loaded, load_student(out, teacher=loaded, device=config.train.device), progress)


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
    newest = checkpoint.newest_valid(folder, only="ema")
    if newest is None:
        raise FileNotFoundError(f"no valid checkpoint in {folder / 'checkpoints'}")
    saved = checkpoint.read(newest, only="ema")
    best = saved.state["progress"]["best"]
    if which == "best" and best is not None and best["iteration"] != saved.state["progress"]["iteration"]:
        saved = checkpoint.read(checkpoint.folder_of(folder, int(best["iteration"])), only="ema")
    if saved.state["teacher"] != checkpoint.fingerprint(student.teacher.denoiser):
        raise ValueError(f"{folder} was distilled from other weights than those of {student.teacher.card.name!r} now")
    student.denoiser.load(_merged(student, folder, saved.tensors["ema"]))
    return replace(student, iteration=saved.state["progress"]["iteration"])


def untrained_student(folder: str | Path, *, teacher: Teacher | None = None, device: str = "auto") -> Student:
    """The student of a run folder as it was before training: the teacher's weights in the student's sampler."""
    place = device_of(device)
    if not (Path(folder) / CONFIG).is_file():
        raise FileNotFoundError(f"no run at {folder}: {CONFIG} is missing; `fewstep list runs` names the runs in runs/")
    config = resolve(config=Path(folder) / CONFIG)
    teacher = teacher or load_teacher(config.teacher, **config.teacher_options)
    if config.negative_prompt is not None:
        teacher = teacher.against(config.negative_prompt)
    files = (Path(folder) / PROMPTS, Path(config.prompts)) if config.prompts else ()  # the run's copy first
    if found := [path for path in files if path.is_file()]:
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


def default_out(teacher: str, method: str) -> Path:
    """Where a run goes if the user names no folder."""
    return Path("runs") / f"{Path(teacher).name}-{method}"
