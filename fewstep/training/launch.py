"""From a resolved configuration to a trainer that is ready to run, every user's mistake caught on the way."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from rich.console import Console

from fewstep.bar import bar
from fewstep.config import RunConfig, differences, read_yaml
from fewstep.environment import describe, device_of
from fewstep.models.trio import Trio
from fewstep.objectives.base import student_of
from fewstep.rng import Rng, key
from fewstep.teachers.base import Teacher
from fewstep.teachers.pipelines import UNETS, pipeline_class
from fewstep.training import checkpoint
from fewstep.training.data import PromptData
from fewstep.training.options import TrainConfig
from fewstep.training.pairs import PairData, PairsCard, read_card
from fewstep.training.preview import Preview
from fewstep.training.prompts import read_prompts
from fewstep.training.reals import RealData, captioned_pictures, encoded
from fewstep.training.trainer import Trainer

CONFIG = "config.yaml"
PROMPTS = "prompts.txt"
OURS = (
    CONFIG,
    "environment.json",
    "metrics.jsonl",
    "checkpoints",
    "previews",
    "tensorboard",
    "eval.json",
    "eval.csv",
    "eval.md",
)
LEFTOVERS = ("config.tmp", "environment.tmp", "metrics.tmp", "eval.tmp")
"""What a run writes into its folder (the latter if it is killed), and what --overwrite deletes."""
COPY = (PROMPTS, "prompts.tmp")
"""Deleted with a run, but no sign of one: a user's own file may well have this name."""


def prepare(
    config: RunConfig,
    out: Path,
    load: Callable[[], Teacher],
    *,
    resume: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> tuple[Trainer, Teacher]:
    """Check everything, load the teacher, build the trio and the trainer; with `resume`, restore its state.

    Everything that can be wrong with the request is checked before `load` reads any weight.
    Raises ValueError, LookupError or OSError that names the value, what is allowed and the remedy.
    """
    console = console or Console(stderr=True)
    _check_surroundings(config.train)
    given = _given_prompts(config, out, resume)
    if config.data is not None:
        captioned_pictures(Path(config.data))
    card = _given_pairs(config)
    _check_family(config)
    start = _open_folder(config, out, resume, overwrite)
    teacher = load()
    _check_weights(card, teacher, config.pairs)
    if config.negative_prompt is not None:
        teacher = teacher.against(config.negative_prompt)
    prompts = given or teacher.prompts
    _check_needs(config, teacher, prompts)
    accelerator = _accelerator(config.train)
    console = console if accelerator.is_main_process else Console(quiet=True)
    teacher.to(accelerator.device)  # the trio shares its parameters, but each skeleton has buffers of its own
    reals = _real_data(config, teacher, console) if "latents" in config.objective.needs else None
    pairs = PairData(Path(config.pairs), teacher.encode, config.train.seed) if config.pairs else None
    with bar("encoding prompts", len(prompts), console) as done:
        data = PromptData(prompts, teacher.encode, teacher.shape, config.train.seed, done, reals, pairs)
    trio = _trio(config, teacher, data)
    showing, samples = teacher.showing(prompts), config.train.evaluate_samples
    monitor = Preview(showing, out, config.objective.sampler, samples, console=console)
    trainer = Trainer(
        config.train, trio, config.objective, data, out=out, accelerator=accelerator, monitor=monitor, console=console
    )
    if start is not None:
        trainer.load(start)
    elif "jvp" in config.objective.needs:
        _probe(config, trainer)
    accelerator.wait_for_everyone()  # nobody writes before all processes have looked at the folder
    if accelerator.is_main_process:
        if resume:
            said = f"resuming {out} after iteration {trainer.progress.iteration}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        if overwrite:
            _clear(out)
        checkpoint.write_text(out / CONFIG, config.to_yaml())
        if given:
            checkpoint.write_text(out / PROMPTS, "\n".join(given) + "\n")
        checkpoint.write_text(out / "environment.json", json.dumps(describe(), indent=1))
    return trainer, teacher


def _probe(config: RunConfig, trainer: Trainer) -> None:
    """Let the method look whether its networks' derivatives are sound, on two samples."""
    device, ids = trainer.accelerator.device, (0, 1)
    rng = Rng(config.train.seed, 0, "generator", ids, device)
    config.objective.probe(trainer.trio, trainer.data.batch(ids, device), rng)  # type: ignore[attr-defined]


def _trio(config: RunConfig, teacher: Teacher, data: PromptData) -> Trio:
    """The networks that the method asks for, on the teacher's device."""
    train, method = config.train, config.objective
    trio = Trio.build(
        teacher.denoiser,
        method.roles,
        sharing=train.sharing,
        lora=train.lora,
        init=teacher.student,
        student=student_of(method, key(train.seed, "own")),
        seed=key(train.seed, "lora"),
    )
    if "head" in method.roles:
        network = method.features(trio)  # type: ignore[attr-defined]
        trio.add_head(network, data.batch((0,)), getattr(method, "gan_taps", ()), seed=key(train.seed, "head"))
    if train.gradient_checkpointing:
        trio.checkpoint_activations()
    return trio


def _real_data(config: RunConfig, teacher: Teacher, console: Console) -> RealData:
    """The pictures of the folder that the configuration names, or the samples that the teacher brings."""
    if config.data is not None:
        folder = Path(config.data)
        source = f"{teacher.card.source}@{teacher.card.revision}"
        with bar("encoding pictures", len(captioned_pictures(folder)), console) as done:
            reals = encoded(folder, teacher.codec, teacher.shape, source, done)
    else:
        assert teacher.reals is not None  # _check_needs
        reals = teacher.reals()
    return RealData(reals, teacher.encode, config.train.seed)


def _given_prompts(config: RunConfig, out: Path, resume: bool) -> tuple[str, ...] | None:
    """The prompts of the file that the configuration names; of the resumed run's copy where its own file has gone."""
    if not config.prompts:
        return None
    copy = out / PROMPTS
    gone = resume and copy.is_file() and not Path(config.prompts).exists()
    # Only for the very name that the run was started with: another one would be a new file's, misspelt.
    moved = gone and read_yaml(out / CONFIG).get("prompts") == config.prompts
    return read_prompts(copy if moved else config.prompts)


def _given_pairs(config: RunConfig) -> PairsCard | None:
    """What the named folder of pairs says of itself; None if the method needs none."""
    method, name = config.method, Path(config.teacher).name
    if "pairs" not in config.objective.needs:
        if config.pairs is not None:
            raise ValueError(f"method {method!r} with these settings reads no pairs; leave --pairs out")
        return None
    guidance = config.to_dict()["method"]["guidance"]
    against = [] if config.negative_prompt is None else [f"--negative-prompt {config.negative_prompt!r}"]
    build = " ".join(["fewstep pairs --teacher", config.teacher, f"--guidance {guidance:g}", *against])
    if config.pairs is None:
        raise ValueError(
            f"method {method!r} needs noise and what the teacher's ODE makes of it: build such pairs once with "
            f"`{build} --out pairs/{name}`, then give --pairs pairs/{name}"
        )
    card = read_card(config.pairs)
    if (card.guidance, card.negative_prompt) != (guidance, config.negative_prompt):
        raise ValueError(
            f"{config.pairs} was sampled with guidance {card.guidance:g} and negative prompt {card.negative_prompt!r}, "
            f"but the real score is to be guided with {guidance:g} and {config.negative_prompt!r}: the two losses "
            f"would pull apart. Give --set method.guidance={card.guidance:g}, or build others with `{build}`"
        )
    return card


def _check_family(config: RunConfig) -> None:
    """Before its weights are read, for a teacher that is here."""
    if "blocks" in config.objective.needs and pipeline_class(config.teacher) in UNETS:
        raise ValueError(
            f"method {config.method!r} runs a transformer's last blocks apart, and {config.teacher!r} is a UNet; take "
            "a transformer, as fashion-dit, or another method, as dmd2"
        )


def _check_weights(card: PairsCard | None, teacher: Teacher, folder: str | None) -> None:
    if card is not None and card.weights != checkpoint.fingerprint(teacher.denoiser):
        raise ValueError(
            f"the pairs in {folder} were sampled from {card.teacher!r}, whose weights are not those of "
            f"{teacher.card.source!r}; build them anew with `fewstep pairs`"
        )


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
    for name in OURS + LEFTOVERS + COPY:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _resumable(config: RunConfig, out: Path) -> Path | None:
    """The newest valid checkpoint; None if the run was killed before its first, and starts again with nothing lost."""
    if not (out / CONFIG).is_file():
        raise FileNotFoundError(f"no run to resume at {out}: {CONFIG} is missing; leave --resume out to start one")
    changed = differences(read_yaml(out / CONFIG), config.to_dict())
    if changed:
        raise ValueError(
            f"{out} was started with other settings; a resumed run must keep them. Changed: {'; '.join(changed)}. "
            "Give the old values, or start another run with another --out."
        )
    found = checkpoint.newest_valid(out)
    if found is None and checkpoint.all_of(out):
        raise FileNotFoundError(f"no valid checkpoint in {out / 'checkpoints'}; start anew with --overwrite")
    return found


def _check_needs(config: RunConfig, teacher: Teacher, prompts: Sequence[str]) -> None:
    if not prompts:
        raise ValueError(
            f"teacher {teacher.card.name!r} brings no prompts to distil on, and the empty one alone would teach a "
            "student nothing about any other; give --prompts FILE, one prompt per line"
        )
    needs, settings = config.objective.needs, config.to_dict()["method"]
    if missing := needs - {"latents", "pairs", "jvp", "blocks"}:
        raise ValueError(
            f"method {config.method!r} needs {', '.join(sorted(missing))}, which this version cannot supply"
        )
    if "latents" in needs and config.data is None and teacher.reals is None:
        method: Any = config.objective
        gan = "gan_weight" in settings and "latents" not in replace(method, gan_weight=0.0, r1_weight=0.0).needs
        leave = ", or --set method.gan_weight=0" if gan else ""
        raise ValueError(
            f"method {config.method!r} with these settings needs real samples{' (its GAN)' if leave else ''}, and "
            f"teacher {teacher.card.name!r} brings none; give --data FOLDER with captioned pictures{leave}"
        )
    for name in ("guidance", "fake_guidance", "pretraining_guidance"):
        scale = settings.get(name)  # a method may have none
        if scale not in (None, 1) and not teacher.encode(prompts[:1]).null:
            raise ValueError(
                f"method.{name} = {scale}, but teacher {teacher.card.name!r} has no unconditional branch; "
                f"use --set method.{name}=1"
            )


def _check_surroundings(config: TrainConfig) -> None:
    if device_of(config.device).type == "cpu" and config.precision == "fp16":
        raise ValueError("precision 'fp16' needs a CUDA device (its loss scaler has no CPU form); use fp32, or bf16")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package: pip install tensorboard")


def _accelerator(config: TrainConfig) -> Accelerator:
    # accelerate keeps one state per process: an earlier run's precision and device would decide this one's.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.precision == "fp32" else config.precision
    # Left to itself, accelerate takes mps or whatever else it finds.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # the others wait while the main process evaluates
    return Accelerator(cpu=device_of(config.device).type == "cpu", mixed_precision=precision, kwargs_handlers=[patient])
