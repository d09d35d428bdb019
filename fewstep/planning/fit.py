"""What to change so that a distillation fits into a GPU: each remedy is planned, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fewstep.config import RunConfig
from fewstep.planning.plan import GIB, Plan, plan
from fewstep.teachers.base import TEACHERS
from fewstep.teachers.fashion import WEIGHTS


@dataclass(frozen=True)
class Remedy:
    """Flags of `fewstep distill`, and what they make of a configuration."""

    flags: tuple[str, ...]
    config: RunConfig


def fits(made: Plan, gpu_memory: float) -> bool:
    """Whether a GPU with so many GiB holds it, with what is beside the tensors."""
    return made.needed <= gpu_memory


def remedies(made: Plan) -> Iterator[Remedy]:
    """What can be done about memory, each with all before it: from what costs least to what changes the student.

    Checkpointing, one sample at a time, bf16, an adapted fake score, an adapted student, three quarters and half of a
    picture's resolution.
    """
    flags: tuple[str, ...] = ()
    config = made.config
    for flag, change in _steps(made):
        if (changed := change(config)) != config:
            flags, config = (
                (*(f for f in flags if f.split()[0] != "--sharing" or "--sharing" not in flag), flag),
                changed,
            )
            yield Remedy(flags, config)
    side = made.size[-1]
    for share in (0.75, 0.5) if _loads(config.teacher) and len(made.size) == 2 else ():
        size = round(side * share / 64) * 64
        if 64 <= size < side:
            options = {**config.teacher_options, "resolution": size}
            yield Remedy((*flags, f"--resolution {size}"), replace(config, teacher_options=options))


def _steps(made: Plan) -> list[tuple[str, Callable[[RunConfig], RunConfig]]]:
    whole = made.config.train.batch_size // made.gpus
    steps: list[tuple[str, Callable[[RunConfig], RunConfig]]] = [
        ("--gradient-checkpointing", lambda c: _train(c, gradient_checkpointing=True)),
        (f"--set train.accumulate={whole}", lambda c: _train(c, accumulate=whole)),
    ]
    if _loads(made.config.teacher):
        dtype = {"dtype": "bf16"}
        steps.append(("--set teacher.dtype=bf16", lambda c: replace(c, teacher_options={**c.teacher_options, **dtype})))
    steps.append(("--precision bf16", lambda c: c if c.train.precision == "fp16" else _train(c, precision="bf16")))
    if "fake_score" in made.config.objective.roles:
        steps.append(("--sharing lora-fake", lambda c: _train(c, sharing="lora-fake") if _full(c) else c))
    steps.append(("--sharing lora", lambda c: _train(c, sharing="lora")))
    return steps


def first_fit(
    made: Plan, gpu_memory: float, say: Callable[[str], None] = lambda text: None
) -> tuple[Remedy, Plan] | None:
    """The first of the remedies by which it fits, and its plan; None if none does.  say: told of each try."""
    for remedy in remedies(made):
        say(f"trying {' '.join(remedy.flags)}")
        tried = plan(remedy.config, gpus=made.gpus, sharded=made.sharded)
        if fits(tried, gpu_memory):
            return remedy, tried
    return None


def verdict(made: Plan, gpu_memory: float | None) -> str:
    """One line: what a GPU must have, and whether this one has it."""
    held = made.peak / GIB
    parts = f"{held:.1f} GiB of tensors, 5% for the allocator's gaps, 1 GiB for CUDA's context and libraries"
    if gpu_memory is None:
        return f"needs {made.needed:.1f} GiB on each GPU ({parts})"
    word = "fits into" if fits(made, gpu_memory) else "does not fit into"
    return f"{word} {gpu_memory:g} GiB: needs {made.needed:.1f} ({parts})"


def _train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def _full(config: RunConfig) -> bool:
    return config.train.sharing == "copies"


def _loads(teacher: str) -> bool:
    """Whether the teacher is one that takes a dtype; the embedded ones do not."""
    return teacher not in TEACHERS or not (WEIGHTS / teacher).is_dir()
