"""A student as a diffusers pipeline folder, one file, or a LoRA file for its teacher's, to run without fewstep."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fewstep.export_adapter import write_adapter
from fewstep.export_card import LOADING, draws_noise, model_card, write_recipe, write_samples
from fewstep.export_single import write_single
from fewstep.sampling import Student
from fewstep.students import load_adapter, load_student
from fewstep.teachers.base import FewSteps

Format = Literal["pipeline", "single", "lora", "kohya"]
"""A pipeline's folder, its networks as one file in their original layout, or a LoRA file for the teacher's own pipeline
under diffusers' or kohya's names."""


def export_run(
    run: Path, to: Path, *, which: Literal["best", "last"] = "best", form: Format = "pipeline", samples: int = 4
) -> Path:
    """Write the student of a run with its few-step scheduler, a model card, its recipe and a picture.  Returns `to`.

    form: see `Format`.  samples: images in the picture.  The folder appears whole or not at all.
    Raises ValueError if it exists, if the teacher is no pipeline, for a LoRA file of a student that is no adapter, or
    for one file of a family that never was one.
    """
    if form not in get_args(Format):
        raise ValueError(f"format {form!r} is not known; allowed: {', '.join(get_args(Format))}")
    if samples < 0:
        raise ValueError(f"samples must be >= 0, got {samples}; 0 leaves the picture out")
    if to.exists():
        raise ValueError(f"{to} exists; choose a folder that does not exist yet")
    student = load_student(run, which=which, device="cpu")
    folder, few_steps = student.teacher.folder, student.teacher.few_steps
    if folder is None or few_steps is None:
        raise ValueError(
            f"teacher {student.teacher.card.name!r} is no diffusers pipeline, so there is nothing to export into; "
            "its student can be used through fewstep.load_student"
        )
    steps, extras = student.sampler.num_steps, student.denoiser.backbone.extras
    if extras - {"until"} or (extras and steps > 1):
        raise ValueError(
            f"a student in {steps} steps that is told {', '.join(sorted(extras))} has no diffusers pipeline; use it "
            "through fewstep.load_student"
        )
    temporary = to.parent / f".writing-{to.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    pipe, call = few_step_pipeline(student, folder, few_steps)
    if form in ("pipeline", "single"):
        getattr(pipe, few_steps.part).load_state_dict(student.denoiser.plain_state())
    if form == "pipeline":
        pipe.save_pretrained(temporary, safe_serialization=True)
        loading = LOADING
    elif form == "single":
        loading = write_single(pipe, temporary)
    else:
        adapter = load_adapter(run, student.teacher, which)
        loading = write_adapter(pipe, student.teacher, *adapter, few_steps.part, temporary, form)
    write_recipe(run, temporary)
    shown = write_samples(student, temporary, samples)
    preset = {"scheduler": type(pipe.scheduler).__name__} | call
    card = model_card(student, call, run, which, loading, form=form, preset=preset, shown=shown)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    os.replace(temporary, to)
    return to


def few_step_pipeline(student: Student, source: Path, few_steps: FewSteps) -> tuple[Any, dict[str, Any]]:
    """The teacher's pipeline with the student's scheduler, and the exact call's arguments."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True)
    levels = student.sampler.grid(student.denoiser.schedule)
    told = student.denoiser.backbone.network_time(levels)
    call = few_steps.set_up(pipe, levels, told, draws_noise(student))
    if "resolution" in student.teacher.options:
        _, height, width = student.teacher.codec.image_shape(student.teacher.shape)
        call |= {"height": height, "width": width}
    return pipe, call
