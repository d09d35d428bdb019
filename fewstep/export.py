"""A student as a diffusers pipeline folder that needs no fewstep to run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from fewstep.api import load_student
from fewstep.environment import describe
from fewstep.sampling import Student


def export_run(run: Path, to: Path, *, which: Literal["best", "last"] = "best") -> Path:
    """Write the student of a run as a pipeline folder with its few-step scheduler and a model card.  Returns `to`.

    The folder appears whole or not at all.  Raises ValueError if it exists or the teacher is no pipeline.
    """
    if to.exists():
        raise ValueError(f"{to} exists; choose a folder that does not exist yet")
    student = load_student(run, which=which)
    folder = student.teacher.folder
    if folder is None:
        raise ValueError(
            f"teacher {student.teacher.card.name!r} is no local pipeline folder, so there is nothing to export into; "
            "its student can be used through fewstep.load_student"
        )
    temporary = to.parent / f".writing-{to.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    call = write_pipeline(student, folder, temporary)
    (temporary / "README.md").write_text(model_card(student, call, run), encoding="utf-8")
    os.replace(temporary, to)
    return to


def write_pipeline(student: Student, source: Path, to: Path) -> dict[str, Any]:
    """Save the teacher's pipeline with the student's network and scheduler.  Returns the exact call's arguments."""
    from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

    pipe = DiffusionPipeline.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True)
    pipe.transformer.load_state_dict(student.denoiser.backbone.module.state_dict())
    stochastic = student.sampler.stochastic and student.sampler.num_steps > 1
    # No shift of the scheduler's own: the times that the card names are final.
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, stochastic_sampling=stochastic)
    pipe.save_pretrained(to, safe_serialization=True)
    return {
        "num_inference_steps": student.sampler.num_steps,
        **_times(student),
        "guidance_scale": 1.0,
        "max_sequence_length": min(pipe.tokenizer.model_max_length, 1024),
    }


def _times(student: Student) -> dict[str, Any]:
    """The pipeline's `timesteps`, whole numbers that the network is told, and `sigmas` where the levels are others."""
    grid = student.sampler.grid(student.denoiser.schedule)
    told = student.denoiser.backbone.network_time(grid).round()
    times: dict[str, Any] = {"timesteps": [int(t) for t in told.tolist()]}
    return times if torch.allclose(told / 1000, grid) else times | {"sigmas": grid.tolist()}


def is_exact(student: Student) -> bool:
    """Whether the student's times are whole for the network: the pipeline rounds others, by up to half a thousandth."""
    told = student.denoiser.backbone.network_time(student.sampler.grid(student.denoiser.schedule))
    return torch.allclose(told, told.round(), atol=1e-3)


def model_card(student: Student, call: dict[str, Any], run: Path) -> str:
    """The exported folder's README: the exact call, which equality holds, what it was measured to be."""
    steps, seeded = student.sampler.num_steps, not student.sampler.stochastic or student.sampler.num_steps == 1
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    seeding = "torch.Generator('cpu').manual_seed(seed)" if seeded else "None"
    equality = (
        "Image i of `fewstep sample --seed SEED` is made by `generator=torch.Generator('cpu').manual_seed(SEED + i)`."
        if seeded
        else "The pipeline does not hand its generator to the scheduler, which draws fresh noise between steps: "
        "image i of `fewstep sample --seed SEED` is made by `torch.manual_seed(SEED + i)` and no `generator`."
    )
    seed_line = "" if seeded else "torch.manual_seed(seed)\n"
    if not is_exact(student):
        equality += " Up to rounding: the pipeline tells its network whole timesteps only, and these are not."
    measured = run / "eval.md"
    table = measured.read_text(encoding="utf-8") if measured.is_file() else "Not measured yet: `fewstep eval`.\n"
    return f"""---
library_name: diffusers
license: other
base_model: {student.teacher.card.name}
---
# {student.teacher.card.name}, distilled to {steps} step{"s" * (steps > 1)}

Made with fewstep {describe()["packages"]["fewstep"]} from {student.teacher.card.name}
(licence of the teacher: {student.teacher.card.licence}).

```python
import torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
{seed_line}image = pipe(prompt, generator={seeding}, {arguments}).images[0]
```

{equality} One prompt a call.

{table}
The run's configuration:

```json
{json.dumps({"num_steps": steps, "stochastic": student.sampler.stochastic, "shift": student.sampler.shift})}
```
"""
