"""What a run has made, seen and taken away: sample, export, report, list."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep import flags, listing
from fewstep.cli.shell import app, border, console, load_plugins, output, say, which_of


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

        student = load_student(run, which=which_of(which), device=device)
        with bar("sampling", n, console) as done:
            images = student.sample(n, prompt or None, seed, num_steps, batch_size=batch_size, progress=done)
        path = pictures.save(pictures.panel(images, columns=min(n, 8), scale=4), out or run / "samples.png")
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
        path = export_run(run, to, which=which_of(which), form=cast(Any, form), samples=samples)  # checked there
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
