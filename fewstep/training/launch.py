"""From a resolved configuration to a trainer that is ready to run, every user's mistake caught on the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from rich.console import Console
from torch import Tensor

from fewstep.config import RunConfig, differences, read_yaml
from fewstep.environment import describe, device_of
from fewstep.files import write_text
from fewstep.metrics.clip_score import agreement, load_clip_scorer
from fewstep.models.attention import choose_attention
from fewstep.models.denoiser import Denoiser
from fewstep.models.perception import Perception
from fewstep.models.trio import Trio
from fewstep.objectives.base import student_of
from fewstep.processes import processes_of_group
from fewstep.rng import Rng, key
from fewstep.students import load_student
from fewstep.teachers.base import Teacher
from fewstep.training import checkpoint, fsdp
from fewstep.training.checkpoint import CONFIG, PROMPTS
from fewstep.training.checks import (
    check_brought,
    check_derivatives,
    check_family,
    check_lookers,
    check_needs,
    check_student,
    check_surroundings,
    check_weights,
    given_pairs,
    given_prompts,
)
from fewstep.training.data import PromptData, load_data
from fewstep.training.latents import captions_of
from fewstep.training.options import TrainConfig
from fewstep.training.preview import Preview
from fewstep.training.prompts import LISTED, write_copy
from fewstep.training.trainer import Trainer

OURS = (
    CONFIG,
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "previews",
    "tensorboard",
    "wandb",
    "board.id",
    "report.html",
    "eval.json",
    "eval.csv",
    "eval.md",
)
LEFTOVERS = ("config.tmp", "environment.tmp", "metrics.tmp", "eval.tmp", "board.tmp", "report.tmp")
"""What a run writes into its folder (the latter if it is killed), and what --overwrite deletes."""
BESIDE = (PROMPTS, LISTED, "prompts.tmp", "figures.jsonl", "figures-*.json", "figures-*.tmp")
"""Deleted with a run, but no sign of one: a user's own file may well have this name, and measured images have some."""


def prepare(
    config: RunConfig,
    out: Path,
    load: Callable[[], Teacher] | Teacher,
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Trainer, Teacher]:
    """Check everything, load the teacher, build the trio and the trainer; with `resume`, restore its state.

    load: the teacher, or what loads it.  Everything that can be wrong with the request is checked before it reads any
    weight.
    Raises ValueError, LookupError or OSError that names the value, what is allowed and the remedy.
    """
    console = console or Console(stderr=True)
    check_surroundings(config.train)
    if fsdp.asked():
        fsdp.check_launch()
        fsdp.check_request(config)
    given = given_prompts(config, out, resume)
    captions = captions_of(Path(config.data)) if config.data is not None else None
    card = given_pairs(config)
    check_student(config, resume)
    check_family(config)
    check_derivatives(config)
    check_lookers(config, isinstance(load, Teacher))
    check_brought(config, isinstance(load, Teacher))
    start = _open_folder(config, out, resume, overwrite)
    teacher = load if isinstance(load, Teacher) else load()
    check_weights(card, teacher, config.pairs)
    teacher = teacher if config.negative_prompt is None else teacher.against(config.negative_prompt)
    prompts = given or teacher.prompts
    check_needs(config, teacher, prompts)
    accelerator = _accelerator(config.train)
    console = console if accelerator.is_main_process else Console(quiet=True)
    if reason := _cannot_leave(config, teacher):
        console.print(f"this student will have no export: {reason}", highlight=False, markup=False, soft_wrap=True)
    data = load_data(config, teacher, prompts, captions, accelerator, console)  # the encoders have the device alone
    if divided := fsdp.divides(accelerator):  # its parts go to the device, what was loaded stays on the CPU
        fsdp.check_batch(data.batch((0,)))
    else:
        teacher.to(accelerator.device)  # the trio shares its parameters, but each skeleton has buffers of its own
    trio = build_trio(config, teacher, data, again=start is not None)
    showing, samples = teacher.showing(prompts), config.train.evaluate_samples
    monitor = Preview(
        replace(showing, denoiser=trio.real_score) if divided else showing,
        out,
        config.objective.sampler,
        samples,
        console=console,
        processes=processes_of_group(),
    )
    teacher.release(keep=monitor.prompts())
    if start is None and "jvp" in config.objective.needs:
        _probe(config, trio, data, accelerator.device, console)
    trainer = Trainer(
        config.train, trio, config.objective, data, out=out, accelerator=accelerator, monitor=monitor, console=console
    )
    if start is not None:
        trainer.load(start)
    accelerator.wait_for_everyone()  # nobody writes before all processes have looked at the folder
    if accelerator.is_main_process:
        if resume:
            said = f"resuming {out} after iteration {trainer.progress.iteration}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        if overwrite:
            _clear(out)
        write_text(out / CONFIG, config.to_yaml())
        if given:
            write_copy(given, out)
        write_text(out / "environment.json", json.dumps(describe(), indent=1))
    return trainer, teacher


def _cannot_leave(config: RunConfig, teacher: Teacher) -> str:
    """Why the teacher's pipeline cannot tell its network this student's times; "" if it can, or is none."""
    if teacher.few_steps is None:
        return ""
    levels = config.objective.sampler.grid(teacher.denoiser.schedule)
    try:
        teacher.few_steps.tells(teacher.denoiser.backbone.network_time(levels))
    except ValueError as error:
        return str(error)
    return ""


def _probe(config: RunConfig, trio: Trio, data: PromptData, device: torch.device, console: Console) -> None:
    """Let the method look whether its networks' derivatives are sound, on two samples and before autocast is on.

    Finite differences, which are what it compares with, are all noise in half precision.
    """
    dtype = trio.generator.backbone.dtype
    if dtype.itemsize < 4:
        told = f"the derivatives of a network in {str(dtype).removeprefix('torch.')} are not checked before training"
        remedy = "teacher.dtype=fp32 checks them, and precision=bf16 still computes in bf16"
        console.print(f"{told}: {remedy}", highlight=False, markup=False, soft_wrap=True)
        return
    rng = Rng(config.train.seed, 0, "generator", (0, 1), device)
    config.objective.probe(trio, data.batch((0, 1), device), rng)  # type: ignore[attr-defined]


def build_trio(config: RunConfig, teacher: Teacher, data: PromptData, *, again: bool = False) -> Trio:
    """The networks that the method asks for, on the teacher's device.  again: a checkpoint will fill them."""
    train, method = config.train, config.objective
    own = student_of(method, key(train.seed, "own"))
    if config.student is not None and not again:
        own = _started(own, load_student(config.student, teacher=teacher, device=train.device).denoiser.plain_state())
    trio = Trio.build(
        teacher.denoiser,
        method.roles,
        sharing=train.sharing,
        lora=train.lora,
        init=teacher.student,
        student=own,
        seed=key(train.seed, "lora"),
    )
    if "head" in method.roles:
        network = method.features(trio)  # type: ignore[attr-defined]
        trio.add_head(network, data.batch((0,)), getattr(method, "gan_taps", ()), seed=key(train.seed, "head"))
    for network in (trio.generator, trio.real_score, *([trio.fake_score] if trio.fake_score else [])):
        for module in network.networks():
            choose_attention(module, train.attention)
    if train.gradient_checkpointing:
        trio.checkpoint_activations()
    trio.perception = _perception(config, teacher)
    return trio


def _perception(config: RunConfig, teacher: Teacher) -> Perception | None:
    """What the method asks for to look at pictures."""
    needs, folder = config.objective.needs, config.to_dict()["method"].get("clip")
    if not needs & {"lpips", "clip", "black"}:
        return None
    distance = teacher.lpips() if "lpips" in needs and teacher.lpips is not None else None
    load = teacher.clip if folder is None else partial(load_clip_scorer, Path(folder))
    agrees = agreement(load()) if "clip" in needs and load is not None else None
    black = None
    if "black" in needs:
        black = teacher.codec.encode(torch.full((1, *teacher.codec.image_shape(teacher.shape)), -1.0))
    return Perception(teacher.codec.render, distance, agrees, black)


def _started(
    own: Callable[[Callable[[], Denoiser]], Denoiser] | None, state: Mapping[str, Tensor]
) -> Callable[[Callable[[], Denoiser]], Denoiser]:
    """`own` (see `student_of`) from copies of the start network that hold `state` instead of the teacher's weights."""

    def filled(make: Callable[[], Denoiser]) -> Denoiser:
        network = make()
        network.load(state)
        return network

    return lambda make: filled(make) if own is None else own(lambda: filled(make))


def _open_folder(config: RunConfig, out: Path, resume: bool, overwrite: bool) -> Path | None:
    """Make or check the run folder.  Returns the checkpoint to go on from, if resuming and there is one."""
    if resume and overwrite:
        raise ValueError("--resume and --overwrite exclude each other: keep the run or start it anew")
    exists = out.exists() and (not out.is_dir() or any(out.iterdir()))
    if exists and not out.is_dir():
        raise ValueError(f"{out} is a file; --out takes a folder")
    if resume:
        return _resumable(config, out)
    if exists and not overwrite:
        raise ValueError(
            f"{out} exists and is not empty; go on with --resume, start anew with --overwrite, or choose another --out"
        )
    if exists and not any((out / name).exists() for name in OURS + LEFTOVERS):
        raise ValueError(f"{out} holds files but no run; --overwrite deletes runs only, so choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise PermissionError(f"{out} is not writable; choose another --out")
    return None


def _clear(out: Path) -> None:
    """Delete what an earlier run wrote, once the new one is known to be able to start."""
    for name in OURS + LEFTOVERS + BESIDE:
        for path in out.glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _resumable(config: RunConfig, out: Path) -> Path | None:
    """The newest valid checkpoint; None if the run was killed before its first, and starts again with nothing lost."""
    if not (out / CONFIG).is_file():
        raise FileNotFoundError(f"no run to resume at {out}: {CONFIG} is missing; leave --resume out to start one")
    changed = differences(read_yaml(out / CONFIG), config.to_dict(), config.defaults())
    if changed:
        raise ValueError(
            f"{out} was started with other settings; a resumed run must keep them. Changed: {'; '.join(changed)}. "
            "Give the old values, or start another run with another --out."
        )
    found = checkpoint.newest_valid(out)
    if found is None and checkpoint.all_of(out):
        raise FileNotFoundError(f"no valid checkpoint in {out / 'checkpoints'}; start anew with --overwrite")
    return found


def _accelerator(config: TrainConfig) -> Accelerator:
    # accelerate keeps one state per process: an earlier run's precision and device would decide this one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.precision == "fp32" else config.precision
    # Left to itself, accelerate takes mps or whatever else it finds.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while the main process evaluates
    return Accelerator(cpu=device_of(config.device).type == "cpu", mixed_precision=precision, kwargs_handlers=[patient])
