"""What can be wrong with a request: found before weights are read, or as soon as those tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from fewstep.config import RunConfig, read_yaml
from fewstep.environment import device_of
from fewstep.metrics.clip_score import WEIGHTS as CLIP_WEIGHTS
from fewstep.models.perception import check_lpips
from fewstep.teachers.base import TEACHERS, Teacher
from fewstep.teachers.pipelines import IN_PIECES, OF_CLASSES, is_place, pipeline_class
from fewstep.teachers.published import Published
from fewstep.training import checkpoint
from fewstep.training.checkpoint import CONFIG
from fewstep.training.options import TrainConfig
from fewstep.training.pairs import PairsCard, read_card
from fewstep.training.prompts import copy_in, read_prompts
from fewstep.types import Need
from fewstep_cuda import dispatch

NO_PROMPTS = (
    "teacher {!r} brings no prompts to distil on, and the empty one alone would teach a student nothing about any "
    "other; give --prompts FILE, one prompt per line"
)
NO_CLIP = (
    "method.clip_weight needs a CLIP, and teacher {!r} brings none; give --set method.clip=FOLDER of a transformers "
    "CLIPModel, or --set method.clip_weight=0"
)


def given_prompts(config: RunConfig, out: Path, resume: bool) -> Sequence[str] | None:
    """The prompts of the file that the configuration names; of the resumed run's copy where its own file has gone."""
    if not config.prompts:
        return None
    copy = copy_in(out) if resume and not Path(config.prompts).exists() else None
    # Only for the very name that the run was started with: another one would be a new file's, misspelt.
    moved = copy is not None and read_yaml(out / CONFIG).get("prompts") == config.prompts
    return read_prompts(copy if moved and copy is not None else config.prompts)


def given_pairs(config: RunConfig) -> PairsCard | None:
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


def check_student(config: RunConfig, resume: bool) -> None:
    """The run from whose student to start; a run that is resumed needs it only if it has no checkpoint yet."""
    if config.student is None:
        return
    if config.train.sharing == "lora":
        raise ValueError(
            "--student gives the generator other weights than the teacher's, and with --sharing lora they share them; "
            "take --sharing lora-fake or copies"
        )
    found = Path(config.student) / CONFIG
    if not found.is_file():
        if resume:
            return
        raise FileNotFoundError(f"no run at {config.student}: {CONFIG} is missing; --student takes a run's folder")
    name = read_yaml(found).get("teacher", {}).get("name")
    if name != config.teacher:
        raise ValueError(
            f"the student of {config.student} was distilled from {name!r}, and --teacher is {config.teacher!r}; both "
            "must be the same"
        )


def check_derivatives(config: RunConfig) -> None:
    """That torch.compile and foreign attention leave the method what it needs."""
    if config.train.attention == "xformers" and "jvp" in config.objective.needs:
        raise ValueError(
            f"method {config.method!r} takes derivatives through attention, and xformers has none of that kind; give "
            "--set train.attention=auto"
        )
    if config.train.compile and (found := config.objective.needs & {"jvp", "blocks"}):
        why = {
            "jvp": "takes derivatives through the network's own operations, which compiled ones hide",
            "blocks": "runs a network's blocks apart, not its compiled forward",
        }
        raise ValueError(f"method {config.method!r} {why[min(found)]}; give --set train.compile=false")


def check_family(config: RunConfig) -> None:
    """Before its weights are read, for a teacher of which that much is known."""
    if "blocks" not in config.objective.needs:
        return
    found = pipeline_class(config.teacher, config.teacher_options.get("source"))
    if found is not None and found not in IN_PIECES:
        raise ValueError(
            f"method {config.method!r} runs a transformer's last blocks apart, and {config.teacher!r} is a {found}, "
            f"which cannot be taken apart here; take a {', '.join(sorted(IN_PIECES))}, as fashion-dit, or another "
            "method, as dmd2"
        )


def check_brought(config: RunConfig, loaded: bool) -> None:
    """That prompts and pictures are named for a teacher that brings none, before it is fetched from the hub.

    loaded: it is here already, and may bring anything.
    """
    source = config.teacher_options.get("source", config.teacher)
    if loaded or not _pipeline(config.teacher):
        return
    if Path(source).exists():  # what is wrong with the folder comes first, and takes no time
        pipeline_class(config.teacher, config.teacher_options.get("source"))
        return
    if not config.prompts and pipeline_class(config.teacher) not in OF_CLASSES:
        raise ValueError(NO_PROMPTS.format(config.teacher))
    if "latents" in config.objective.needs and config.data is None:
        raise ValueError(_no_reals(config, config.teacher))


def _pipeline(name: str) -> bool:
    """Whether this is a diffusers pipeline, which brings nothing with it; the embedded teachers bring all."""
    return is_place(name) or (name in TEACHERS and isinstance(TEACHERS.get(name), Published))


def check_lookers(config: RunConfig, loaded: bool) -> None:
    """That what is to look at pictures can be loaded, as far as this is known before a teacher is.

    loaded: it is already, and may bring anything.
    """
    needs, clip = config.objective.needs, config.to_dict()["method"].get("clip")
    foreign = _pipeline(config.teacher) and not loaded
    if "lpips" in needs and foreign:
        check_lpips()
    if clip is not None and not (Path(clip) / CLIP_WEIGHTS).is_file():
        raise FileNotFoundError(
            f"method.clip = {clip!r}: no {CLIP_WEIGHTS} there; it takes the folder of a transformers CLIPModel, as "
            "`hf download laion/CLIP-ViT-B-32-laion2B-s34B-b79K --local-dir FOLDER` makes one"
        )
    if "clip" in needs and clip is None and foreign:
        raise ValueError(NO_CLIP.format(config.teacher))


def check_weights(card: PairsCard | None, teacher: Teacher, folder: str | None) -> None:
    """That pairs are of this teacher's very weights."""
    if card is not None and card.weights != checkpoint.fingerprint(teacher.denoiser):
        raise ValueError(
            f"the pairs in {folder} were sampled from {card.teacher!r}, whose weights are not those of "
            f"{teacher.card.source!r}; build them anew with `fewstep pairs`"
        )


def check_needs(config: RunConfig, teacher: Teacher, prompts: Sequence[str]) -> None:
    """That teacher and prompts supply what the method reads."""
    if not prompts:
        raise ValueError(NO_PROMPTS.format(teacher.card.name))
    needs, settings = config.objective.needs, config.to_dict()["method"]
    for need, what, off in (
        ("lpips", "LPIPS compares", "distance=mse"),
        ("black", "black is of", "black_filter=false"),
    ):
        if need in needs and teacher.lpips is None:
            raise ValueError(
                f"{what} pictures, and the samples of teacher {teacher.card.name!r} are points; use --set method.{off}"
            )
    if "clip" in needs and teacher.clip is None and settings.get("clip") is None:
        raise ValueError(NO_CLIP.format(teacher.card.name))
    if missing := needs - set(get_args(Need)):
        raise ValueError(
            f"method {config.method!r} needs {', '.join(sorted(missing))}, which this version cannot supply"
        )
    if "latents" in needs and config.data is None and teacher.reals is None:
        raise ValueError(_no_reals(config, teacher.card.name))
    for name in ("guidance", "fake_guidance", "pretraining_guidance"):
        scale = settings.get(name)  # a method may have none
        if scale not in (None, 1) and not teacher.encode(prompts[:1]).null:
            raise ValueError(
                f"method.{name} = {scale}, but teacher {teacher.card.name!r} has no unconditional branch; "
                f"use --set method.{name}=1"
            )


def _no_reals(config: RunConfig, name: str) -> str:
    """What to do for a method that needs real samples."""
    method: Any = config.objective
    settings = config.to_dict()["method"]
    off = {f.name: f.default for f in fields(method) if f.name.startswith(("gan_", "r1_"))} | {"gan_weight": 0.0}
    gan = "gan_weight" in settings and "latents" not in replace(method, **off).needs
    leave = ", or --set method.gan_weight=0" if gan else ""
    return (
        f"method {config.method!r} with these settings needs real samples{' (its GAN)' if leave else ''}, and "
        f"teacher {name!r} brings none; give --data FOLDER with captioned pictures{leave}"
    )


def check_surroundings(config: TrainConfig) -> None:
    """That this machine and environment can do what is asked."""
    dispatch.check_environment()
    if device_of(config.device).type == "cpu" and config.precision == "fp16":
        raise ValueError("precision 'fp16' needs a CUDA device (its loss scaler has no CPU form); use fp32, or bf16")
    if config.attention == "xformers" and find_spec("xformers") is None:
        raise ValueError("train.attention = 'xformers' needs the package: pip install xformers; or leave it at auto")
    if config.attention == "xformers" and device_of(config.device).type == "cpu":
        raise ValueError("train.attention = 'xformers' needs a CUDA device; leave it at auto")
    eight = [name for name in ("generator", "critic") if getattr(config, name).kind == "adamw8bit"]
    if eight and find_spec("bitsandbytes") is None:
        raise ValueError(
            f"train.{eight[0]}.kind = 'adamw8bit' needs the package: pip install bitsandbytes; or give adamw"
        )
    if eight and device_of(config.device).type == "cpu":
        raise ValueError(
            f"train.{eight[0]}.kind = 'adamw8bit' needs a CUDA device (bitsandbytes has no such kernels for the CPU); "
            "give adamw"
        )
    for name in config.trackers:
        if find_spec(name) is None:
            raise ValueError(f"train.trackers has {name!r}, which needs the package: pip install {name}")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs the package: pip install tensorboard")
