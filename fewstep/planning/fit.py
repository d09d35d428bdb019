"""What to change so that a distillation fits into a GPU: each remedy is planned, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewstep.config import RunConfig
from fewstep.models.trio import Sharing
from fewstep.planning.plan import FRAGMENTATION, GIB, OVERHEAD, Plan, plan
from fewstep.teachers.base import TEACHERS
from fewstep.teachers.fashion import WEIGHTS

VOID_WITH_ADAPTERS = ("--sharing", "--set train.offload_teacher")
"""How flags begin that another sharing takes the place of."""


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

    Checkpointing, one sample at a time, bf16, moments of 8 bits, a teacher that visits the GPU, an adapted fake score,
    an adapted student, three quarters and half of a picture's resolution.
    """
    flags: tuple[str, ...] = ()
    config = made.config
    for flag, change in _steps(made):
        if (changed := change(config)) != config:
            void = VOID_WITH_ADAPTERS if flag.startswith("--sharing") else ()
            flags, config = (*(f for f in flags if not f.startswith(void)), flag), changed
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
    players = ("generator", "critic") if "fake_score" in made.config.objective.roles else ("generator",)
    steps.append((" ".join(f"--set train.{player}.kind=adamw8bit" for player in players), lambda c: _8bit(c, players)))
    steps.append(("--set train.offload_teacher=true", lambda c: _train(c, offload_teacher=True) if _full(c) else c))
    if "fake_score" in made.config.objective.roles:
        steps.append(("--sharing lora-fake", lambda c: _shared(c, "lora-fake") if _full(c) else c))
    steps.append(("--sharing lora", lambda c: _shared(c, "lora")))
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
    beside = f"{FRAGMENTATION:.0%} for the allocator's gaps, {OVERHEAD:g} GiB for CUDA's context and libraries"
    parts = f"{held:.1f} GiB of tensors, {beside}"
    if gpu_memory is None:
        return f"needs {made.needed:.1f} GiB on each GPU ({parts})"
    word = "fits into" if fits(made, gpu_memory) else "does not fit into"
    return f"{word} {gpu_memory:g} GiB: needs {made.needed:.1f} ({parts})"


def _train(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **changes))


def _8bit(config: RunConfig, players: Sequence[str]) -> RunConfig:
    kinds = {player: replace(getattr(config.train, player), kind="adamw8bit") for player in players}
    return _train(config, **kinds)


def _shared(config: RunConfig, sharing: Sharing) -> RunConfig:
    return _train(config, sharing=sharing, offload_teacher=False)


def _full(config: RunConfig) -> bool:
    return config.train.sharing == "copies"


def _loads(teacher: str) -> bool:
    """Whether the teacher is one that takes a dtype; the embedded ones do not."""
    return teacher not in TEACHERS or not (WEIGHTS / teacher).is_dir()
