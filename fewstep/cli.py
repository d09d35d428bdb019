"""The command line: parse, resolve, call one function.

This module imports neither torch nor anything that does, so that --help and wrong flags answer at once; names and
fields for `list` come from index.json, which a test compares with the registries.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from fewstep import flags, listing

app = typer.Typer(
    name="fewstep",
    help="Turn a slow diffusion model into a 1-8 step generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
output = Console()


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
        "teacher": _given(name=teacher, resolution=resolution),
        "method": _given(name=method, num_steps=num_steps),
        "train": _given(**train, tensorboard=tensorboard, lora=lora, generator=rate, critic=rate),
        **_given(**paths, negative_prompt=negative_prompt),
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
    _run(trainer)
    if trainer.accelerator.is_main_process:
        after = ", ".join(f"fewstep {command} {folder}" for command in ("eval", "sample", "export"))
        say(f"done: {folder}. Next: {after} --to FOLDER")


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
        "teacher": _given(name=teacher, resolution=resolution),
        "method": _given(name=method, num_steps=num_steps),
        "train": _given(**train, gradient_checkpointing=gradient_checkpointing, lora=lora),
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


@app.command()
def sample(
    run: flags.RunFolder,
    n: Annotated[int, typer.Option("--n", "-n", help="Number of images.")] = 16,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable. By default the teacher's.")] = None,
    seed: Annotated[int, typer.Option(help="Image i uses seed + i.")] = 0,
    num_steps: Annotated[int | None, typer.Option(help="Sampling steps; by default those trained for.")] = None,
    out: Annotated[Path | None, typer.Option(help="PNG to write; by default RUN/samples.png.")] = None,
    which: flags.Which = "best",
    device: flags.Device = "auto",
    batch_size: flags.BatchSize = None,
    plugin: flags.Plugin = None,
) -> None:
    """Make images with the student of a run and write them as one PNG."""
    with border():
        load_plugins(plugin)
        from fewstep import pictures
        from fewstep.api import load_student
        from fewstep.bar import bar

        student = load_student(run, which=_which(which), device=device)
        with bar("sampling", n, console) as done:
            images = student.sample(n, prompt or None, seed, num_steps, batch_size=batch_size, progress=done)
        path = pictures.save(pictures.panel(images, columns=min(n, 8), scale=4), out or run / "samples.png")
    output.print(str(path), highlight=False, soft_wrap=True)


@app.command("eval")
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or with --protocol or --score a folder of images.")
    ],
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="Samples behind each figure: 10,000, or as many as the protocol.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="First sampling seed; none was used in training or to choose a checkpoint.")
    ] = 50_000_000,
    seeds: Annotated[int, typer.Option(help="Sets of --n samples; with more than one, means and deviations.")] = 1,
    which: flags.Which = "best",
    recompute_teacher: flags.RecomputeTeacher = False,
    untrained: flags.Untrained = True,
    device: flags.Device = "auto",
    batch_size: flags.BatchSize = None,
    protocol: flags.Protocol = None,
    reference: flags.Reference = None,
    images: flags.Images = None,
    also: flags.Also = None,
    weights: flags.Weights = None,
    sha256: flags.Sha256 = None,
    unverified: flags.Unverified = False,
    clip: flags.Clip = None,
    clip_sha256: flags.ClipSha256 = None,
    prompts: flags.ImagePrompts = None,
    score: flags.Score = None,
    python: flags.Python = None,
    options: flags.Options = None,
    timeout: flags.Timeout = None,
    to: Annotated[Path | None, typer.Option(help="JSON lines to add to; by default figures.jsonl in RUN.")] = None,
    plugin: flags.Plugin = None,
) -> None:
    """Measure teacher, untrained student and student; write eval.md, eval.csv and eval.json into the run folder.

    With --protocol: measure the student, or a folder of images, as published figures are.
    With --score: by a package that lives in another environment, which is asked there.
    """
    with border():
        load_plugins(plugin)
        asked = {"reference": reference, "also": also, "weights": weights, "sha256": sha256, "clip": clip}
        asked |= {"clip_sha256": clip_sha256, "unverified": unverified or None}
        scored = {"python": python, "option": options, "timeout": timeout}
        placed = {"prompts": prompts, "images": images, "to": to}
        if (protocol or score) and (recompute_teacher or not untrained):
            raise ValueError(
                "--recompute-teacher and --no-untrained go without --protocol and --score, which measure one set"
            )
        if score is not None:
            _without({"n": n, "seeds": None if seeds == 1 else seeds}, "without --score, which takes all prompts once")
            _without({"protocol": protocol, **asked}, "without --score; see `fewstep list scores`")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("--score asks another environment once; start one process, without accelerate launch")
        else:
            _without(scored, "with --score NAME; see `fewstep list scores`")
        if protocol is None and score is None:
            _without(asked, "with --protocol NAME; see `fewstep list protocols`")
            _without(placed, "with --protocol NAME or --score NAME")
        from fewstep.processes import processes

        given: dict[str, Any] = {"seed": seed, "which": _which(which), "batch_size": batch_size, "console": console}
        with processes(device) as group:
            if score is not None:
                from fewstep import scoring

                told = _given(python=python, timeout=timeout, prompts=prompts, options=_pairs(options))
                request = scoring.Scoring(score, device=device, **told)
                shown = scoring.table(scoring.score(run, request, images=images, to=to, **given))
            elif protocol is not None:
                from fewstep.measuring import Request, measure, table

                given |= {"n": n, "seeds": seeds, "processes": group}
                request = Request(protocol, device=device, **cast(Any, _given(**asked, prompts=prompts)))
                shown = table(measure(run, request, images=images, to=to, **given))
            else:
                from fewstep.evaluation import evaluate_run

                given |= {"n": 10_000 if n is None else n, "seeds": seeds, "processes": group}
                given |= {"recompute_teacher": recompute_teacher, "untrained": untrained}
                shown = evaluate_run(run, device=device, **given)
    if group.main:
        output.print(shown, highlight=False, markup=False, soft_wrap=True)


@app.command()
def diversity(
    run: flags.RunFolder,
    per_prompt: Annotated[int, typer.Option(help="Images of each prompt; all pairs of them are compared.")] = 4,
    n: Annotated[int | None, typer.Option("--n", "-n", help="Prompts, the first so many; by default all.")] = None,
    prompts: flags.Prompts = None,
    seed: Annotated[int, typer.Option(help="First sampling seed; each image has one of its own.")] = 50_000_000,
    which: flags.Which = "best",
    with_teacher: Annotated[
        bool, typer.Option("--with-teacher", help="Measure the teacher, too, in 50 steps.")
    ] = False,
    device: flags.Device = "auto",
    batch_size: flags.BatchSize = None,
    to: Annotated[Path | None, typer.Option(help="JSON lines to add to; by default figures.jsonl in RUN.")] = None,
    plugin: flags.Plugin = None,
) -> None:
    """Measure how much the student's images of one prompt differ: mean pairwise LPIPS."""
    with border():
        load_plugins(plugin)
        from fewstep.diversity import COLUMNS, measure_diversity
        from fewstep.measuring import table
        from fewstep.processes import processes
        from fewstep.training.prompts import read_prompts

        given = read_prompts(prompts) if prompts else ()
        options: dict[str, Any] = {"n": n, "prompts": given, "seed": seed, "which": _which(which), "to": to}
        options |= {"with_teacher": with_teacher, "device": device, "batch_size": batch_size, "console": console}
        with processes(device) as group:
            shown = table(measure_diversity(run, per_prompt, processes=group, **options), COLUMNS)
    if group.main:
        output.print(shown, highlight=False, markup=False, soft_wrap=True)


@app.command()
def reference(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Real images.")],
    protocol: Annotated[str, typer.Option(help="Whose eyes they are seen with; see `fewstep list protocols`.")],
    to: Annotated[Path, typer.Option(metavar="FILE.npz", help="File to write; must not exist yet.")],
    features: Annotated[bool, typer.Option("--features", help="Keep them, for figures that compare features.")] = False,
    weights: flags.Weights = None,
    sha256: flags.Sha256 = None,
    unverified: flags.Unverified = False,
    device: flags.Device = "auto",
) -> None:
    """Write what `fewstep eval --protocol` holds samples against: the moments of real images' features."""
    with border():
        from fewstep.measuring import Request, make_reference
        from fewstep.processes import processes

        request = Request(protocol, weights=weights, sha256=sha256, unverified=unverified, device=device)
        with processes(device) as group:
            path = make_reference(folder, request, to, features=features, console=console, processes=group)
    if group.main:
        output.print(str(path), highlight=False, soft_wrap=True)


@app.command()
def export(
    run: flags.RunFolder,
    to: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    which: flags.Which = "best",
    form: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="pipeline|single|lora|kohya",
            help="A pipeline's folder, one file in the original layout, or a LoRA file for the teacher's.",
        ),
    ] = "pipeline",
    samples: Annotated[int, typer.Option(help="Images in the folder's picture; 0 leaves it out.")] = 4,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload the folder as this new repository, too.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="The new repository is seen by its owner alone.")] = False,
    plugin: flags.Plugin = None,
) -> None:
    """Write the student as a diffusers pipeline folder, one file or a LoRA file, with its scheduler and a card."""
    with border():
        load_plugins(plugin)
        from fewstep.export import export_run
        from fewstep.publish import check_push, push

        if private and push_to_hub is None:
            raise ValueError("--private goes with --push-to-hub OWNER/NAME; leave it out")
        if push_to_hub is not None:
            check_push(push_to_hub)
        path = export_run(run, to, which=_which(which), form=cast(Any, form), samples=samples)  # checked there
        output.print(str(path), highlight=False, soft_wrap=True)
        if push_to_hub is not None:
            output.print(push(path, push_to_hub, private=private), highlight=False, soft_wrap=True)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Folders of runs; several are shown beside each other.")
    ],
    to: Annotated[Path | None, typer.Option(help="The file; default: report.html in the first run's folder.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Show it on this machine, and anew while a run goes on.")] = (
        False
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --serve; 0: any that is free.")] = 0,
) -> None:
    """Write a page of a run: samples over training, curves, figures, and what they say in words."""
    with border():
        if serve and to is not None:
            raise ValueError("--to goes without --serve, which writes no file")
        if serve:
            from fewstep.report.serve import serve as run_server

            return run_server(runs, port, say)
        from fewstep.report.page import write_report

        output.print(str(write_report(runs, to)), highlight=False, soft_wrap=True)


@app.command("list")
def show(
    what: Annotated[
        str,
        typer.Argument(
            metavar="teachers|methods|runs|protocols|scores|kernels|NAME",
            help="What to list, or a method's name for all about it.",
        ),
    ] = "methods",
    name: Annotated[str | None, typer.Argument(help="After `methods`: a method's name.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder that holds the runs.")] = Path("runs"),
    plugin: flags.Plugin = None,
) -> None:
    """List teachers, methods, runs, protocols, scores, kernels; with a method's name, its paper, needs and settings."""
    with border():
        if name is not None and what != "methods":
            raise ValueError(
                f"a second name goes with `methods` alone, got {what} {name}: try `fewstep list methods NAME`"
            )
        what = name or what
        load_plugins(plugin)
        output.print(listing.table_of(what, runs, plugins=bool(plugin)))


def main() -> None:
    """Entry point of the `fewstep` command."""
    app()


@contextmanager
def border() -> Iterator[None]:
    """Where users' mistakes end: one clear message and exit code 2, no traceback (FEWSTEP_TRACEBACK=1 shows it)."""
    try:
        yield
    except (ValueError, LookupError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))


def fail(message: str) -> None:
    """Print one message, on one line, and exit with code 2."""
    say(f"error: {' '.join(message.split())}")
    raise typer.Exit(2)


def say(message: str) -> None:
    """One line to the person at the keyboard (standard error; results go to standard output)."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def load_plugins(paths: list[Path] | None) -> None:
    """Import the files named with --plugin."""
    from fewstep.registry import load_plugin

    for path in paths or ():
        load_plugin(path)


def _run(trainer: Any) -> None:
    """Train; a signal ends with 128 + its number, a run that cannot go on with 1, each with one message."""
    from fewstep.sampling import NotFinite
    from fewstep.training.trainer import Diverged, Interrupted

    signum = 0
    try:
        trainer.run()
    except Interrupted as stop:
        say(str(stop))
        signum = stop.signum
    except (Diverged, NotFinite) as stop:
        say(f"error: {stop}")
        raise typer.Exit(1) from None
    # A process that exits within its group may abort in one of gloo's threads.  All come here or none: after an error,
    # which may be one process's alone, the launcher ends the rest.
    trainer.accelerator.end_training()
    if signum:
        raise typer.Exit(128 + signum)


def _given(**values: Any) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _without(flags: dict[str, Any], where: str) -> None:
    """Raises ValueError that names the first flag that was given although it has no effect."""
    if names := list(_given(**flags)):
        raise ValueError(f"--{names[0].replace('_', '-')} goes {where}")


def _pairs(items: list[str] | None) -> dict[str, str]:
    """KEY=VALUE texts.  Raises ValueError for what is none, or is there twice."""
    found: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals) or name in found:
            raise ValueError(f"--option {item!r} should be KEY=VALUE, each key once")
        found[name] = value
    return found


def _lora(rank: int | None, alpha: float | None, targets: list[str] | None) -> dict[str, Any] | None:
    return _given(rank=rank, alpha=alpha, targets=targets or None) or None


def _recipe(resolved: Any) -> str:
    untuned = "no recipe for this teacher and method: running on untuned defaults"
    return f"recipe {resolved.recipe}" if resolved.recipe else untuned


def _which(value: str) -> Any:
    if value not in ("best", "last"):
        raise ValueError(f"--which {value!r} is not known; allowed: best, last")
    return value


if __name__ == "__main__":
    sys.exit(main())
