"""A student as a diffusers pipeline folder, one file, or a LoRA file for its teacher's, to run without fewstep."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from fewstep.environment import describe
from fewstep.evaluation import Row, markdown
from fewstep.export_adapter import write_adapter
from fewstep.export_single import write_single
from fewstep.sampling import Student
from fewstep.students import load_adapter, load_student
from fewstep.teachers.base import FewSteps

Format = Literal["pipeline", "single", "lora", "kohya"]
"""A pipeline's folder, its networks as one file in their original layout, or a LoRA file for the teacher's own pipeline
under diffusers' or kohya's names."""
LOADING = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)"""


def export_run(run: Path, to: Path, *, which: Literal["best", "last"] = "best", form: Format = "pipeline") -> Path:
    """Write the student of a run with its few-step scheduler and a model card.  Returns `to`.

    form: see `Format`.  The folder appears whole or not at all.  Raises ValueError if it exists, if the teacher is no
    pipeline, for a LoRA file of a student that is no adapter, or for one file of a family that never was one.
    """
    if form not in get_args(Format):
        raise ValueError(f"format {form!r} is not known; allowed: {', '.join(get_args(Format))}")
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
    (temporary / "README.md").write_text(model_card(student, call, run, which, loading), encoding="utf-8")
    os.replace(temporary, to)
    return to


def few_step_pipeline(student: Student, source: Path, few_steps: FewSteps) -> tuple[Any, dict[str, Any]]:
    """The teacher's pipeline with the student's scheduler, and the exact call's arguments."""
    from diffusers import DiffusionPipeline

    pipe: Any = DiffusionPipeline.from_pretrained(str(source), dtype=torch.float32, use_safetensors=True)
    levels = student.sampler.grid(student.denoiser.schedule)
    told = student.denoiser.backbone.network_time(levels)
    call = few_steps.set_up(pipe, levels, told, _draws_noise(student))
    if "resolution" in student.teacher.options:
        _, height, width = student.teacher.codec.image_shape(student.teacher.shape)
        call |= {"height": height, "width": width}
    return pipe, call


def _draws_noise(student: Student) -> bool:
    """Whether fresh noise enters between its steps."""
    return student.sampler.stochastic and student.sampler.num_steps > 1


def is_exact(student: Student) -> bool:
    """Whether the network is told the student's own times: some pipelines round them, by up to half a thousandth."""
    if student.teacher.few_steps is not None and not student.teacher.few_steps.whole:
        return True
    told = student.denoiser.backbone.network_time(student.sampler.grid(student.denoiser.schedule))
    return torch.allclose(told, told.round(), atol=1e-3)


def model_card(student: Student, call: dict[str, Any], run: Path, which: str = "best", loading: str = LOADING) -> str:
    """The exported folder's README: the exact call, which equality holds, what it was measured to be."""
    steps, teacher, few_steps = student.sampler.num_steps, student.teacher.card, student.teacher.few_steps
    revision = f" at revision {teacher.revision}" if teacher.revision else ""
    seeded = not _draws_noise(student) or (few_steps is not None and few_steps.seeded)
    equality = (
        "Image i of `fewstep sample --seed SEED` is made by `generator=torch.Generator('cpu').manual_seed(SEED + i)`."
        if seeded
        else "The pipeline does not hand its generator to the scheduler, which draws fresh noise between steps: "
        "image i of `fewstep sample --seed SEED` is made by `torch.manual_seed(SEED + i)` and no `generator`."
    )
    if not is_exact(student):
        equality += " Up to rounding: the pipeline tells its network whole timesteps only, and these are not."
    return f"""---
library_name: diffusers
license: other
base_model: {teacher.name}
---
# {teacher.name}, distilled to {steps} step{"s" * (steps > 1)}

Made with fewstep {describe()["packages"]["fewstep"]} from {teacher.name}{revision}
(licence of the teacher: {teacher.licence}).

```python
import torch
{loading}
{_code(student, call, seeded)}
```

{equality} One prompt a call.

{_measured(student, run, which)}

The run's configuration:

```json
{json.dumps(asdict(student.sampler))}
```
"""


def _code(student: Student, call: dict[str, Any], seeded: bool) -> str:
    """The card's lines that make one picture."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.items())
    generator = "torch.Generator('cpu').manual_seed(seed)" if seeded else "None"
    lines = [] if seeded else ["torch.manual_seed(seed)"]
    if student.sampler.start is not None:  # a pipeline's own latents have unit variance
        sigma = float(student.sampler.begin(torch.ones(1, dtype=torch.float64), student.denoiser.schedule))
        shape = (1, *student.teacher.shape)
        lines += [f"generator = {generator}", f"latents = {sigma:.7g} * torch.randn({shape}, generator=generator)"]
        if student.teacher.few_steps is not None and student.teacher.few_steps.packed:
            lines.append("latents = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT")
        generator, arguments = "generator", f"latents=latents, {arguments}"
    return "\n".join([*lines, f"image = pipe(prompt, generator={generator}, {arguments}).images[0]"])


def _measured(student: Student, run: Path, which: str) -> str:
    """The run's table if it is of this very checkpoint, else how to get one."""
    path = run / "eval.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if student.iteration is None or record.get("iteration") != student.iteration:
        return f"This checkpoint is not measured yet: `fewstep eval RUN --which {which}`, then export it again."
    return markdown([Row(**row) for row in record["rows"]])
