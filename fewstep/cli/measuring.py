"""How good it is: eval, diversity, reference."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from fewstep import flags
from fewstep.cli.shell import app, border, console, load_plugins, only_given, output, which_of, without


@app.command("eval")
def evaluate(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder, or with --protocol or --score a folder of images.")
    ],
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="Samples behind each figure: 10,000, or as many as the protocol.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="First sampling seed, by default 50,000,000; none was used in training or to choose a checkpoint."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Sets of --n samples; with more than one, means and deviations.")] = 1,
    which: Annotated[
        str | None, typer.Option(help="Checkpoint: best (by the running figure), the default, or last.")
    ] = None,
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
            without({"n": n, "seeds": None if seeds == 1 else seeds}, "without --score, which takes all prompts once")
            without({"protocol": protocol, **asked}, "without --score; see `fewstep list scores`")
            if int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise ValueError("--score asks another environment once; start one process, without accelerate launch")
        else:
            without(scored, "with --score NAME; see `fewstep list scores`")
        if protocol is None and score is None:
            without(asked, "with --protocol NAME; see `fewstep list protocols`")
            without(placed, "with --protocol NAME or --score NAME")
        from fewstep.processes import processes
        from fewstep.training.checkpoint import CONFIG

        sampling = only_given(seed=seed, which=None if which is None else which_of(which), batch_size=batch_size)
        if (protocol or score) and (images is not None or (run.is_dir() and not (run / CONFIG).is_file())):
            without(sampling, "with a run whose student is sampled; the pictures of a folder are there already")
        given: dict[str, Any] = {**sampling, "console": console}
        with processes(device) as group:
            if score is not None:
                from fewstep import scoring

                told = only_given(python=python, timeout=timeout, prompts=prompts, options=_pairs(options))
                request = scoring.Scoring(score, device=device, **told)
                shown = scoring.table(scoring.score(run, request, images=images, to=to, **given))
            elif protocol is not None:
                from fewstep.measuring import Request, measure, table

                given |= {"n": n, "seeds": seeds, "processes": group}
                request = Request(protocol, device=device, **cast(Any, only_given(**asked, prompts=prompts)))
                shown = table(measure(run, request, images=images, to=to, **given))
            else:
                from fewstep.evaluation import evaluate_run

                given |= {"n": 10_000 if n is None else n, "seeds": seeds, "processes": group}
                given |= {"recompute_teacher": recompute_teacher, "untrained": untrained}
                shown = evaluate_run(run, device=device, **given)
    if group.main:
        output.print(shown, highlight=False, markup=False, soft_wrap=True)


def _pairs(items: list[str] | None) -> dict[str, str]:
    """KEY=VALUE texts.  Raises ValueError for what is none, or is there twice."""
    found: dict[str, str] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not (name and equals) or name in found:
            raise ValueError(f"--option {item!r} should be KEY=VALUE, each key once")
        found[name] = value
    return found


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
        options: dict[str, Any] = {"n": n, "prompts": given, "seed": seed, "which": which_of(which), "to": to}
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
