"""Before and while a student is trained: distill, plan, pairs."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fewstep import flags
from fewstep.cli.shell import app, border, console, load_plugins, only_given, output, say


@app.command()
def distill(
    teacher: flags.Teacher = None,
    method: flags.Method = None,
    config: flags.Config = None,
    num_steps: flags.NumSteps = None,
    iterations: flags.Iterations = None,
    batch_size: flags.GlobalBatch = None,
    lr: flags.Rate = None,
    seed: flags.Seed = None,
    prompts: flags.Prompts = None,
    negative_prompt: flags.NegativePrompt = None,
    data: flags.Data = None,
    pairs: flags.Pairs = None,
    student: flags.Student = None,
    device: flags.TrainDevice = None,
    precision: flags.Precision = None,
    sharing: flags.Sharing = None,
    lora_rank: flags.LoraRank = None,
    lora_alpha: flags.LoraAlpha = None,
    lora_targets: flags.LoraTargets = None,
    gradient_checkpointing: flags.Checkpointing = None,
    resolution: flags.Resolution = None,
    tensorboard: flags.TensorBoard = None,
    out: flags.Out = None,
    resume: flags.Resume = False,
    overwrite: flags.Overwrite = False,
    sets: flags.Sets = None,
    plugin: flags.Plugin = None,
) -> None:
    """Distil a teacher into a few-step student."""
    rate = None if lr is None else {"lr": lr}
    train = {"iterations": iterations, "batch_size": batch_size, "seed": seed, "device": device}
    train |= {"precision": precision, "sharing": sharing, "gradient_checkpointing": gradient_checkpointing}
    lora = _lora(lora_rank, lora_alpha, lora_targets)
    files = {"prompts": prompts, "data": data, "pairs": pairs, "student": student}
    paths = {name: str(path) for name, path in files.items() if path}
    given = {
        "teacher": only_given(name=teacher, resolution=resolution),
        "method": only_given(name=method, num_steps=num_steps),
        "train": only_given(**train, tensorboard=tensorboard, lora=lora, generator=rate, critic=rate),
        **only_given(**paths, negative_prompt=negative_prompt),
    }
    with border():
        load_plugins(plugin)
        from fewstep import api
        from fewstep.config import resolve
        from fewstep.training.launch import prepare

        resolved = resolve(config=config, given=given, sets=sets or ())
        folder = out or api.default_out(resolved.teacher, resolved.method)
        say(_recipe(resolved))

        def load() -> Any:
            return api.load_teacher(resolved.teacher, **resolved.teacher_options)

        trainer, _ = prepare(resolved, folder, load, resume=resume, overwrite=overwrite, console=console)
    code = _run(trainer)
    if code == 0 and trainer.accelerator.is_main_process:
        after = ", ".join(f"fewstep {command} {folder}" for command in ("eval", "sample", "export"))
        say(f"done: {folder}. Next: {after} --to FOLDER")
    _end(code, trainer.accelerator)


@app.command()
def plan(
    teacher: flags.Teacher = None,
    method: flags.Method = None,
    config: flags.Config = None,
    num_steps: flags.NumSteps = None,
    batch_size: flags.GlobalBatch = None,
    precision: flags.Precision = None,
    sharing: flags.Sharing = None,
    lora_rank: flags.LoraRank = None,
    lora_alpha: flags.LoraAlpha = None,
    lora_targets: flags.LoraTargets = None,
    gradient_checkpointing: flags.Checkpointing = None,
    resolution: flags.Resolution = None,
    gpus: flags.Gpus = 1,
    fsdp: flags.Fsdp = False,
    gpu_memory: flags.GpuMemory = None,
    as_json: flags.Json = False,
    sets: flags.Sets = None,
    plugin: flags.Plugin = None,
) -> None:
    """Tell what distilling would take, memory and FLOPs, from the teacher's config alone: no weights, no GPU."""
    train = {"batch_size": batch_size, "precision": precision, "sharing": sharing}
    if batch_size is not None and not any(item.startswith("train.accumulate=") for item in sets or ()):
        train["accumulate"] = 1  # a recipe's number of parts is that of its own batch
    lora = _lora(lora_rank, lora_alpha, lora_targets)
    given = {
        "teacher": only_given(name=teacher, resolution=resolution),
        "method": only_given(name=method, num_steps=num_steps),
        "train": only_given(**train, gradient_checkpointing=gradient_checkpointing, lora=lora),
    }
    with border():
        load_plugins(plugin)
        from fewstep.config import resolve
        from fewstep.planning.report import answer

        resolved = resolve(config=config, given=given, sets=sets or ())
        say(_recipe(resolved))
        shown, fits = answer(resolved, gpus, fsdp, gpu_memory, as_json=as_json, say=say)
    output.print(shown, highlight=False, markup=False, soft_wrap=as_json)
    if not fits:
        raise typer.Exit(1)


@app.command()
def pairs(
    teacher: flags.Teacher,
    out: Annotated[Path, typer.Option(help="Folder to write, or to go on with.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Number of pairs.")] = 10_000,
    num_steps: Annotated[int, typer.Option(help="Sampling steps of the teacher.")] = 50,
    guidance: Annotated[float | None, typer.Option(help="Of the teacher; by default its own. Distil with it.")] = None,
    prompts: flags.Prompts = None,
    negative_prompt: flags.NegativePrompt = None,
    seed: Annotated[int, typer.Option(help="Pair i is of the noise numbered seed + i.")] = 2_000_000,
    device: flags.Device = "auto",
    batch_size: flags.BatchSize = None,
    plugin: flags.Plugin = None,
) -> None:
    """Sample pairs of noise and teacher's ODE once, for methods that regress on them; a stopped build goes on."""
    with border():
        load_plugins(plugin)
        from fewstep.api import load_teacher, make_pairs
        from fewstep.bar import bar
        from fewstep.environment import device_of
        from fewstep.training.pairs import check_request
        from fewstep.training.prompts import read_prompts

        check_request(out, n, num_steps, batch_size)
        place, given = device_of(device), read_prompts(prompts) if prompts else None
        loaded = load_teacher(str(teacher)).to(place)
        options = {"num_steps": num_steps, "guidance": guidance, "prompts": given, "negative_prompt": negative_prompt}
        with bar(f"pairs of {teacher}", n, console) as done:
            make_pairs(loaded, out, n, **options, seed=seed, batch_size=batch_size, progress=done)
    output.print(str(out), highlight=False, soft_wrap=True)


def _run(trainer: Any) -> int:
    """Train, and return the exit code: 0, or 128 and the signal's number, with one message.

    Raises typer.Exit(1), with one message, for a run that cannot go on.
    """
    from fewstep.sampling import NotFinite
    from fewstep.training.trainer import Diverged, Interrupted

    try:
        trainer.run()
    except Interrupted as stop:
        say(str(stop))
        return 128 + stop.signum
    except (Diverged, NotFinite) as stop:
        say(f"error: {stop}")
        raise typer.Exit(1) from None
    return 0


def _end(code: int, accelerator: Any) -> None:
    """End this process, one of several without Python's finalisation.

    There a thread of gloo's may still drop a collective's tensors, for which it takes the interpreter's lock, and
    aborts the process ("terminate called without an active exception").  Leaving the group joins those threads, but
    for networks under FSDP, which hold it.  All processes come here or none: after an error, which may be one
    process's alone, the launcher ends the rest.
    """
    accelerator.end_training()
    if accelerator.num_processes > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        raise typer.Exit(code)


def _lora(rank: int | None, alpha: float | None, targets: list[str] | None) -> dict[str, Any] | None:
    return only_given(rank=rank, alpha=alpha, targets=targets or None) or None


def _recipe(resolved: Any) -> str:
    untuned = "no recipe for this teacher and method: running on untuned defaults"
    return f"recipe {resolved.recipe}" if resolved.recipe else untuned
