"""What tells of an exported student: its model card, the recipe that made it, a picture of what it makes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from fewstep import pictures
from fewstep.config import read_yaml
from fewstep.environment import describe
from fewstep.evaluation import Row, markdown
from fewstep.sampling import Student, cycled
from fewstep.teachers.base import TeacherCard
from fewstep.training.checkpoint import CONFIG
from fewstep.training.preview import grid_prompts

LOADING = """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)"""
RECIPE, SAMPLES = "recipe.yaml", "samples.png"
LICENCES = {
    "Apache-2.0": "apache-2.0",
    "MIT": "mit",
    "CC-BY-NC-4.0": "cc-by-nc-4.0",
    "CreativeML Open RAIL-M": "creativeml-openrail-m",
    "CreativeML Open RAIL++-M": "openrail++",
    "unknown": "unknown",
}
"""A teacher's licence -> the hub's identifier of it."""
TAGS = {"images": "text-to-image", "frames": "text-to-video"}
"""What a student gives -> the hub's word for it."""


def draws_noise(student: Student) -> bool:
    """Whether fresh noise enters between its steps."""
    return student.sampler.stochastic and student.sampler.num_steps > 1


def _rounding(student: Student) -> str:
    """A sentence on the times that the pipeline tells its network if they are not the student's own, else nothing."""
    own = student.denoiser.backbone.network_time(student.sampler.grid(student.denoiser.schedule))
    few_steps = student.teacher.few_steps
    told = own.round() if few_steps is None else few_steps.tells(own)
    if torch.allclose(told, own, atol=1e-3):
        return ""
    theirs, ours = (", ".join(f"{time:g}" for time in times.tolist()) for times in (told, own))
    return f" Up to rounding: the pipeline can tell its network the times {theirs}, and the student's are {ours}."


def write_samples(student: Student, folder: Path, count: int) -> Sequence[str]:
    """Write images 0 to count - 1 of the student's first prompts as one small PNG.  Returns these prompts, if any."""
    prompts = grid_prompts(student.teacher.prompts, count) if count else []
    if prompts:
        images = student.sample(count, prompts, batch_size=1)
        image = pictures.panel(images, columns=min(count, 4), scale=max(1, 128 // images.shape[-2]))
        image.thumbnail((1024, 1024))
        pictures.save(image, folder / SAMPLES)
    return cycled(prompts, 0, count) if prompts else ()


def write_recipe(run: Path, folder: Path) -> None:
    """Write the run's configuration without the places of files on this machine: their names are left."""
    text = yaml.safe_dump(_placeless(read_yaml(run / CONFIG)), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(text, encoding="utf-8")


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _placeless(inner) for name, inner in value.items()}
    local = isinstance(value, str) and (Path(value).is_absolute() or ("/" in value and Path(value).exists()))
    return Path(value).name if local else value


def model_card(
    student: Student,
    call: dict[str, Any],
    run: Path,
    which: str = "best",
    loading: str = LOADING,
    *,
    form: str = "pipeline",
    preset: Mapping[str, Any] | None = None,
    shown: Sequence[str] = (),
) -> str:
    """The exported folder's README: the exact call, which equality holds, what it was measured to be.

    call: arguments of the pipeline's call.  loading: lines that load it.  preset: the scheduler and the call, for
    other programs.  shown: the prompts of the picture, if there is one.
    """
    steps, teacher, few_steps = student.sampler.num_steps, student.teacher.card, student.teacher.few_steps
    name = _placeless(teacher.name)
    revision = f" at revision {teacher.revision}" if teacher.revision else ""
    seeded = not draws_noise(student) or (few_steps is not None and few_steps.seeded)
    equality = (
        "Image i of `fewstep sample --seed SEED` is made by `generator=torch.Generator('cpu').manual_seed(SEED + i)`."
        if seeded
        else "The pipeline does not hand its generator to the scheduler, which draws fresh noise between steps: "
        "image i of `fewstep sample --seed SEED` is made by `torch.manual_seed(SEED + i)` and no `generator`."
    )
    equality += _rounding(student)
    config = read_yaml(run / CONFIG) if (run / CONFIG).is_file() else {}
    return f"""---
{_front_matter(student, config, form)}---
# {name}, distilled to {steps} step{"s" * (steps > 1)}

Made with fewstep {describe()["packages"]["fewstep"]} from {name}{revision}
(licence of the teacher: {teacher.licence}).
{_restricted(teacher)}{_picture(shown)}
```python
import torch
{loading}
{_code(student, call, seeded)}
```

{equality} One prompt a call.

{_measured(student, run, which)}

The scheduler's preset, and the call's arguments:

```json
{json.dumps(preset or call)}
```
{_recipe(config)}"""


def _front_matter(student: Student, config: Mapping[str, Any], form: str) -> str:
    """What the hub sorts by.  The teacher is the base model only if it came from there."""
    teacher, steps, few_steps = student.teacher.card, student.sampler.num_steps, student.teacher.few_steps
    texts = few_steps is None or few_steps.asks == "prompt"  # the hub has no word for pictures of a class
    named = teacher.licence.partition(" (")[0]
    lora = form in ("lora", "kohya")
    method = [config["method"]["name"]] if config else []
    front = {
        "library_name": "diffusers",
        **({"pipeline_tag": TAGS[_gives(student)]} if texts else {}),
        "license": LICENCES.get(named, "other"),
        "license_name": named,
        **({"base_model": teacher.source} if teacher.revision else {}),
        "tags": ["fewstep", "distillation", *method, f"{steps}-step", *(["lora"] if lora else [])],
    }
    return yaml.safe_dump(front, sort_keys=False, allow_unicode=True)


def _restricted(teacher: TeacherCard) -> str:
    if not teacher.restrictions:
        return ""
    return f"\n**Restricted**, as its teacher is: {', and '.join(teacher.restrictions)}.\n"


def _picture(shown: Sequence[str]) -> str:
    if not shown:
        return ""
    prompts = ", ".join(json.dumps(prompt, ensure_ascii=False) for prompt in shown)
    return f"\n![samples]({SAMPLES})\n\nSeeds 0 to {len(shown) - 1}, not chosen: {prompts}.\n"


def _recipe(config: Mapping[str, Any]) -> str:
    if not config:
        return ""
    train = config["train"]
    return (
        f"\nDistilled by {config['method']['name']}: {train['iterations']} iterations of {train['batch_size']}; all "
        f"settings are in `{RECIPE}`, for `fewstep distill --config {RECIPE}`.\n"
    )


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
    name = "video" if _gives(student) == "frames" else "image"
    asks = "prompt" if student.teacher.few_steps is None else student.teacher.few_steps.asks
    return "\n".join([*lines, f"{name} = pipe({asks}, generator={generator}, {arguments}).{_gives(student)}[0]"])


def _gives(student: Student) -> str:
    """Where the result of its pipeline's call is."""
    return "images" if student.teacher.few_steps is None else student.teacher.few_steps.gives


def _measured(student: Student, run: Path, which: str) -> str:
    """The run's table if it is of this very checkpoint, else how to get one."""
    path = run / "eval.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if student.iteration is None or record.get("iteration") != student.iteration:
        return f"This checkpoint is not measured yet: `fewstep eval RUN --which {which}`, then export it again."
    return markdown([Row(**row) for row in record["rows"]])
