"""How much a run's student varies what it shows of one prompt, measured and written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from fewstep.bar import bar
from fewstep.environment import describe, device_of
from fewstep.measuring import FILE, append
from fewstep.metrics.diversity import SIZE, check_per_prompt, diversities
from fewstep.metrics.protocols import protocol_hash
from fewstep.models.perception import Distance, VggLpips
from fewstep.processes import ALONE, Processes
from fewstep.sampling import check_count, sample_teacher
from fewstep.students import load_student
from fewstep.teachers.base import TeacherCard
from fewstep.training.checkpoint import fingerprint

TEACHER_STEPS = 50
COLUMNS = {"model": "model", "steps": "steps", "prompts": "prompts", "per_prompt": "images of each"}


def measure_diversity(
    run: Path,
    per_prompt: int = 4,
    *,
    n: int | None = None,
    prompts: Sequence[str] = (),
    seed: int = 50_000_000,
    which: Literal["best", "last"] = "best",
    with_teacher: bool = False,
    device: str = "auto",
    batch_size: int | None = None,
    to: Path | None = None,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Mean pairwise LPIPS of `per_prompt` pictures of each prompt; a line in a file for each model that is measured.

    n: of the different prompts, the first so many.  prompts: by default the teacher's.  seed: picture j of prompt i has
    the noise numbered seed + i per_prompt + j.  with_teacher: measure it first, in 50 steps.  to: by default
    figures.jsonl in the run.  The distance is the teacher's own: LPIPS with VGG16, or what the embedded teachers have.
    Raises ValueError for fewer than two pictures of a prompt, too few prompts, and a teacher of points.
    """
    check_per_prompt(per_prompt)
    console = processes.console(console)
    student = load_student(run, which=which, device=device)
    teacher = student.teacher
    if teacher.lpips is None:
        raise ValueError(f"diversity compares pictures, and the samples of teacher {teacher.card.name!r} are none")
    different = list(dict.fromkeys(prompts or teacher.prompts))
    n = len(different) if n is None else n
    check_count("n", n)
    if n > len(different):
        raise ValueError(f"--n {n} prompts are asked for, and there are {len(different)} different ones")
    place, distance = device_of(device), processes.main_first(teacher.lpips)
    figure = "LPIPS diversity" if isinstance(distance, VggLpips) else "feature diversity"
    protocol = {"figure": figure, "prompts": different[:n], "per_prompt": per_prompt, "shorter_edge": SIZE}
    protocol["distance"] = _told(distance, teacher.card)

    def measured(model: str, steps: int, make: Callable[..., Tensor], told: dict[str, Any]) -> dict[str, Any]:
        def means(own: range) -> tuple[Tensor]:
            """A prompt at a time: all pictures of all prompts would fit no memory."""
            groups = (make(per_prompt, [different[i]], seed + i * per_prompt, batch_size=batch_size) for i in own)
            found = []
            with bar(f"{model}, prompts", len(own), console) as done:
                for value in diversities(groups, distance, place):
                    found.append(value)
                    done(1)
            return (torch.tensor(found, dtype=torch.float64),)

        (values,) = processes.gather(n, 1, means)
        mean = processes.on_main(lambda: float(values.mean()))  # the others have the values of their own prompts
        made = told | {"model": model, "steps": steps, "seed": seed}
        made |= {"prompts": n, "per_prompt": per_prompt, "n": n * per_prompt, "distance": protocol["distance"]}
        made |= {"protocol": "diversity", "protocol_hash": protocol_hash(protocol)}
        return made | {"figures": {figure: mean}, "environment": describe()}

    records = []
    if with_teacher:
        make = partial(sample_teacher, teacher.to(place), num_steps=TEACHER_STEPS)
        # Whoever is its student: one teacher beside several runs is one model.
        records.append(measured("teacher", TEACHER_STEPS, make, {"name": teacher.card.name, "iteration": None}))
    own = {"name": run.resolve().name, "folder": str(run.resolve()), "iteration": student.iteration}
    records.append(measured("student", student.sampler.num_steps, student.sample, own))
    if processes.main:
        for record in records:
            append(to or run / FILE, record)
    return records


def _told(distance: Distance, card: TeacherCard) -> dict[str, str]:
    """What tells distances apart; the embedded teachers, of one source, share the network of theirs."""
    if isinstance(distance, VggLpips):
        return {"torchmetrics": distance.version, "weights": fingerprint(distance.net)}
    return {"of": card.source}
