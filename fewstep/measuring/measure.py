"""Pictures measured by a protocol's name: those of a folder, or a run's student's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fewstep.measuring.pictures import of_files, samples_of, seen_by
from fewstep.measuring.records import FILE, append, described, over_sets
from fewstep.measuring.references import given_reference, made_of
from fewstep.measuring.request import Request, check_asked, check_samples, checked_files, prompts_of
from fewstep.metrics.image_folder import image_files
from fewstep.metrics.look import COMPARING, figures_of
from fewstep.metrics.protocols import clip_view, find_protocol
from fewstep.metrics.reference import (
    check_enough,
    check_extractor,
)
from fewstep.processes import ALONE, Processes
from fewstep.sampling import check_count
from fewstep.students import load_student
from fewstep.training.checkpoint import CONFIG


def measure(
    target: Path,
    request: Request,
    *,
    images: Path | None = None,
    n: int | None = None,
    seed: int = 50_000_000,
    seeds: int = 1,
    which: Literal["best", "last"] = "best",
    batch_size: int | None = None,
    to: Path | None = None,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> list[dict[str, Any]]:
    """Measure, append lines to a file, and return what was written, a record for each set of samples.

    Of several sets there is one record more: "figures" are their means, "spread" the deviations (divisor n - 1) and
    "least" the minima, which EDM (arXiv:2206.00364) reports of three.

    target: a run folder, whose student makes the pictures, or a folder of images.  images: of a run, made elsewhere.
    n: of a student's samples, by default the protocol's count; fewer rename the figures.  seed, seeds: sample i of set
    k has the noise numbered seed + k n + i.  to: by default figures.jsonl in the target.  processes: which look at the
    pictures together, each at its share; the main one writes.
    Raises ValueError, LookupError or OSError for what cannot be measured, before any weights are read where possible.
    """
    console = processes.console(console)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    protocol = find_protocol(request.protocol)
    check_asked(target, request)
    files, count = None, protocol.count if n is None else n
    if images is not None or not (target / CONFIG).is_file():
        files = image_files(images or target, protocol)
        count = checked_files(files, protocol, n, seeds)
    check_count("n", count)
    check_count("seeds", seeds)
    prompts = prompts_of(request, count, folder=files is not None)
    comparing = COMPARING & {*protocol.figures, *request.also}
    reference, name = given_reference(request, protocol, comparing)
    check_samples(count, files, protocol, request.also, reference, say)
    extractor = request.extractor()
    if "inception_score" in request.also and extractor.head is None:
        raise ValueError(f"an Inception score is of Inception's classes, and {protocol.name} uses {extractor.name}.")
    check_enough(count, extractor.dim, protocol, "the set of samples")
    if "frechet" in protocol.figures and count <= extractor.dim:
        say(f"{count} images for {extractor.dim} features: the covariance is singular, the distance biased upwards")
    if reference is None:
        assert request.reference is not None
        reference = made_of(request.reference, protocol, extractor, console, processes)
    check_extractor(reference, extractor, name)
    scorer = request.scorer()
    views = tuple(dict.fromkeys((protocol, protocol if scorer is None else clip_view(protocol))))
    record = described(
        protocol, request, extractor, scorer, {"file": name, "sha256": reference.sha256, "n": reference.whole.n}
    )
    if files is not None:
        told = {"images": str(images or target), "folder": str((images or target).resolve())}
        sets = iter([(told, of_files(files, views, extractor.channels), prompts)])
    else:
        student = load_student(target, which=which, device=request.device)
        firsts = range(seed, seed + count * seeds, count)
        sets = samples_of(student, views, extractor.channels, prompts, firsts, batch_size)
        record |= {"name": target.resolve().name, "folder": str(target.resolve())}
    groups = [path.parent.name for path in files or () if protocol.categories]
    records = []
    for told, pictures, texts in sets:
        seen = seen_by(extractor, count, pictures, processes, console, protocol.name, scorer, texts)
        figures = processes.on_main(figures_of, seen, protocol, extractor, reference, request.also, groups, scorer)
        records.append(record | told | {"n": count, "figures": figures})
        if processes.main:
            append(to or target / FILE, records[-1])
    if seeds > 1:
        mean, spread, least = over_sets([found["figures"] for found in records])
        records.append(records[0] | {"seeds": seeds, "figures": mean, "spread": spread, "least": least})
        if processes.main:
            append(to or target / FILE, records[-1])
    return records
