"""Pictures measured by a protocol's name: those of a folder, or a run's student's; and references to hold them against.

Every measurement is one line of JSON with all that its figures depend on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from fewstep.bar import bar
from fewstep.environment import describe, device_of
from fewstep.metrics.clip_score import read_clip
from fewstep.metrics.extractors import Extractor, load_extractor
from fewstep.metrics.features import FASHION_CLASSIFIER, load_reference, quantise
from fewstep.metrics.frechet import Moments
from fewstep.metrics.image_folder import batches, check_sizes, image_files, prepared_tensor
from fewstep.metrics.look import COMPARING, SETTINGS, Scorer, Seen, figures_of, look
from fewstep.metrics.names import cell
from fewstep.metrics.open_clip_score import check_open_clip, read_open_clip
from fewstep.metrics.protocols import ALSO, DMD2_CLIP, Protocol, clip_view, find_protocol
from fewstep.metrics.reference import (
    Gaussian,
    Reference,
    check_enough,
    check_extractor,
    check_reference,
    meta_of,
    read_reference,
    write_reference,
)
from fewstep.metrics.suite import FEATURES_FILE, SUBSET_SIZE, over_seeds
from fewstep.processes import ALONE, Processes
from fewstep.sampling import Student, check_count, cycled
from fewstep.students import load_student
from fewstep.training.checkpoint import CONFIG

BATCH = 50
"""Pictures that the extractor sees at a time, and that a process makes or reads at least."""
FILE = "figures.jsonl"
COLUMNS = {"protocol": "protocol", "n": "samples"}
Pictures = Callable[[range], Iterator[tuple[Tensor, ...]]]
"""Of a range of indices, a batch at a time: [B, C, H, W] uint8, twice where a CLIP is shown them otherwise."""


@dataclass(frozen=True)
class Request:
    """What to measure by, before the pictures are named.

    protocol: its name.  reference: an npz file or a folder of real images.  also: of `protocols.ALSO`.  weights,
    sha256, unverified: as in `extractors.load_extractor`.  clip: a folder for a CLIP score, open_clip's for
    `protocols.DMD2_CLIP` and else a CLIPModel.  clip_sha256: of open_clip's weights.  prompts: a file, image i's prompt
    its line i in the order of the files' names.
    """

    protocol: str
    reference: Path | None = None
    also: Sequence[str] = ()
    weights: Path | None = None
    sha256: str | None = None
    unverified: bool = False
    clip: Path | None = None
    clip_sha256: str | None = None
    prompts: Path | None = None
    device: str = "auto"

    def extractor(self) -> Extractor:
        """The protocol's."""
        protocol = find_protocol(self.protocol)
        return load_extractor(
            protocol.extractor,
            resize=protocol.resize,
            weights=self.weights,
            sha256=self.sha256,
            allow_unverified=self.unverified,
            device=device_of(self.device),
        )

    def scorer(self) -> Scorer | None:
        """The protocol's CLIP, if one was given."""
        if self.clip is None or self.protocol not in DMD2_CLIP:
            return None if self.clip is None else read_clip(self.clip)
        return read_open_clip(self.clip, sha256=self.clip_sha256, device=device_of(self.device))


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
    _check_asked(target, request)
    files, count = None, protocol.count if n is None else n
    if images is not None or not (target / CONFIG).is_file():
        files = image_files(images or target, protocol)
        count = _checked_files(files, protocol, n, seeds)
    check_count("n", count)
    check_count("seeds", seeds)
    prompts = _prompts(request, count, folder=files is not None)
    comparing = COMPARING & {*protocol.figures, *request.also}
    reference, name = _given_reference(request, protocol, comparing)
    _check_samples(count, files, protocol, request.also, reference, say)
    extractor = request.extractor()
    if "inception_score" in request.also and extractor.head is None:
        raise ValueError(f"an Inception score is of Inception's classes, and {protocol.name} uses {extractor.name}.")
    check_enough(count, extractor.dim, protocol, "the set of samples")
    if "frechet" in protocol.figures and count <= extractor.dim:
        say(f"{count} images for {extractor.dim} features: the covariance is singular, the distance biased upwards")
    if reference is None:
        assert request.reference is not None
        reference = _made(request.reference, protocol, extractor, console, processes)
    check_extractor(reference, extractor, name)
    scorer = request.scorer()
    views = tuple(dict.fromkeys((protocol, protocol if scorer is None else clip_view(protocol))))
    record = _described(
        protocol, request, extractor, scorer, {"file": name, "sha256": reference.sha256, "n": reference.whole.n}
    )
    if files is not None:
        sets = iter([({"images": str(images or target)}, _of_files(files, views, extractor.channels), prompts)])
    else:
        student = load_student(target, which=which, device=request.device)
        firsts = range(seed, seed + count * seeds, count)
        sets = _samples(student, views, extractor.channels, prompts, firsts, batch_size)
        record["name"] = target.resolve().name
    groups = [path.parent.name for path in files or () if protocol.categories]
    records = []
    for told, pictures, texts in sets:
        seen = _seen(extractor, count, pictures, processes, console, protocol.name, scorer, texts)
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


def over_sets(
    figures: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Mean, deviation and minimum of each figure over sets of samples, two or more."""
    mean, spread = over_seeds(figures)
    return mean, spread, {name: min(found[name] for found in figures) for name in mean}


def _of_files(files: Sequence[Path], views: Sequence[Protocol], channels: int) -> Pictures:
    """Each view reads the files by itself; there are two only where a CLIP is shown another size."""

    def pictures(own: range) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(batches(files[own.start : own.stop], view, channels, BATCH) for view in views))

    return pictures


def _seen(
    extractor: Extractor,
    n: int,
    pictures: Pictures,
    processes: Processes,
    console: Console | None,
    what: str,
    scorer: Scorer | None = None,
    prompts: Sequence[str] = (),
) -> Seen:
    """What all processes saw in n pictures, in order, on the main one."""

    def own_rows(own: range) -> tuple[Tensor, ...]:
        with bar(what, len(own), console) as done:
            seen = look(extractor, pictures(own), scorer=scorer, prompts=prompts[own.start : own.stop], advance=done)
        return (seen.features,) if seen.cosines is None else (seen.features, seen.cosines)

    return Seen(*processes.gather(n, BATCH, own_rows))


def _check_asked(target: Path, request: Request) -> None:
    """Raises LookupError for figures that there are not, OSError for missing folders, ValueError for a stray flag."""
    if unknown := set(request.also) - set(ALSO):
        raise LookupError(f"no figure named {', '.join(sorted(unknown))}; --also takes {', '.join(ALSO)}")
    if request.clip_sha256 is not None and (request.clip is None or request.protocol not in DMD2_CLIP):
        raise ValueError(f"--clip-sha256 goes with --clip FOLDER and {' or '.join(sorted(DMD2_CLIP))}; leave it out")
    if request.clip is not None and request.protocol in DMD2_CLIP:
        check_open_clip(request.clip)
    if not target.is_dir():
        raise FileNotFoundError(f"no run or folder of images at {target}")


def _described(
    protocol: Protocol, request: Request, extractor: Extractor, scorer: Scorer | None, reference: dict[str, Any]
) -> dict[str, Any]:
    """What every record of a measurement says besides its figures."""
    return {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "extractor": extractor.protocol | {"verified": extractor.verified},
        "settings": {figure: SETTINGS[figure] for figure in request.also},
        "clip": None if scorer is None else scorer.protocol,
        "reference": reference,
        "environment": describe(),
    }


def make_reference(
    folder: Path,
    request: Request,
    to: Path,
    *,
    features: bool = False,
    console: Console | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Moments of a folder of real images as an npz file, and their features if wanted.  Returns the path."""
    protocol = find_protocol(request.protocol)
    if to.suffix != ".npz":
        raise ValueError(f"--to {to} should end in .npz")
    if to.exists():
        raise FileExistsError(f"{to} exists; choose another --to")
    check_sizes(image_files(folder, protocol), protocol)
    made = _made(folder, protocol, request.extractor(), processes.console(console), processes)
    if processes.main:
        write_reference(made if features else Reference(made.whole, made.parts, meta=made.meta), to)
    return to


def table(records: Sequence[dict[str, Any]], told: Mapping[str, str] = COLUMNS) -> str:
    """The figures as markdown, a row for each record.  told: what stands before them, by the records' keys."""
    names = list(records[0]["figures"])

    def row(record: dict[str, Any]) -> list[str]:
        figures, several = record["figures"], "seeds" in record
        shown = record | ({"n": f"{record['seeds']} x {record['n']}"} if several else {})
        cells = [
            cell(name, figures, record["spread"], record["least"]) if several else f"{figures[name]:.5g}"
            for name in names
        ]
        return [*(str(shown[key]) for key in told), *cells]

    rows = [[*told.values(), *names], ["---"] * (len(told) + len(names)), *map(row, records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _checked_files(files: Sequence[Path], protocol: Protocol, n: int | None, seeds: int) -> int:
    if n is not None or seeds != 1:
        raise ValueError("--n and --seeds are of a run's student; a folder is measured whole")
    if len(files) > protocol.count:
        raise ValueError(
            f"{len(files)} images are more than the {protocol.count} of {protocol.name}; move the others away, since "
            "the figure depends on their number"
        )
    check_sizes(files, protocol)
    return len(files)


def _check_samples(
    n: int,
    files: Sequence[Path] | None,
    protocol: Protocol,
    also: Sequence[str],
    reference: Reference | None,
    say: Callable[[str], None],
) -> None:
    """Raises ValueError for too few samples; says so where they only rename the figures."""
    if "kid" in also and n < SUBSET_SIZE:
        raise ValueError(f"kid is a mean over subsets of {SUBSET_SIZE}, and there are {n} images; leave it out")
    if reference is not None:
        check_enough(n, len(reference.whole.mu), protocol, "the set of samples")
        for category in protocol.categories if files is not None else ():
            own = sum(path.parent.name == category for path in files or ())
            check_enough(own, len(reference.whole.mu), protocol, f"the set of {category}")
    if n < protocol.count:
        say(
            f"{n} images are fewer than the {protocol.count} of {protocol.name}: its figures are named @{n} and do not "
            "compare with published ones"
        )


def _prompts(request: Request, count: int, *, folder: bool) -> Sequence[str]:
    """Of the file; () where there is none, which a folder with a CLIP score may not have."""
    if request.prompts is None:
        if folder and request.clip is not None:
            raise ValueError("a CLIP score needs the images' prompts: --prompts FILE, line i of image i by name")
        return ()
    from fewstep.training.prompts import read_prompts

    prompts = read_prompts(request.prompts)
    if folder and len(prompts) != count:
        raise ValueError(f"{request.prompts} holds {len(prompts)} prompts for {count} images; one line each is needed")
    return prompts


def _given_reference(request: Request, protocol: Protocol, comparing: Set[str]) -> tuple[Reference | None, str]:
    """The reference and what it is called; None for a folder, which an extractor must look at first."""
    path = request.reference
    if path is None and protocol.extractor == "fashion":
        features = load_file(FASHION_CLASSIFIER / FEATURES_FILE)["features"].float()
        return Reference(Gaussian.of(load_reference()), features=features), "packaged"
    if path is None:
        raise ValueError(f"{protocol.name} needs --reference FILE.npz or a FOLDER of {protocol.reference}")
    if path.is_dir():
        check_sizes(image_files(path, protocol), protocol)
        return None, str(path)
    reference = read_reference(path)
    check_reference(reference, protocol, str(path))
    if comparing and reference.features is None:
        raise ValueError(
            f"{path} holds moments alone, and {', '.join(sorted(comparing))} compares features: name the folder of "
            "real images, or make the file with `fewstep reference --features`"
        )
    return reference, str(path)


def _made(
    folder: Path, protocol: Protocol, extractor: Extractor, console: Console | None, processes: Processes
) -> Reference:
    files = image_files(folder, protocol)
    check_enough(len(files), extractor.dim, protocol, str(folder))
    pictures = _of_files(files, [protocol], extractor.channels)
    seen = _seen(extractor, len(files), pictures, processes, console, f"reference {folder}")
    return processes.on_main(_reference_of, seen, files, folder, protocol, extractor)


def _reference_of(
    seen: Seen, files: Sequence[Path], folder: Path, protocol: Protocol, extractor: Extractor
) -> Reference:
    parts = {}
    for name in protocol.categories:
        rows = [i for i, path in enumerate(files) if path.parent.name == name]
        check_enough(len(rows), extractor.dim, protocol, f"{folder}/{name}")
        parts[name] = Gaussian.of(Moments.of(seen.features[rows]))
    return Reference(Gaussian.of(seen.moments), parts, seen.features, meta_of(protocol, extractor))


def _samples(
    student: Student,
    views: Sequence[Protocol],
    channels: int,
    prompts: Sequence[str],
    firsts: range,
    batch_size: int | None,
) -> Iterator[tuple[dict[str, Any], Pictures, Sequence[str]]]:
    """Sets of a student's samples, one for each first seed: what they are, the pictures, their prompts."""
    n = firsts.step
    texts = cycled(prompts or student.teacher.prompts, 0, n)

    def pictures(seed: int, own: range) -> Iterator[tuple[Tensor, ...]]:
        """A batch at a time: 30,000 of 1024 pixels would fit no memory."""
        for start in own[::BATCH]:
            prompts = texts[start : min(start + BATCH, own.stop)]
            images = quantise(student.sample(len(prompts), prompts, seed + start, batch_size=batch_size))
            yield tuple(prepared_tensor(images, view, channels) for view in views)

    told = {"iteration": student.iteration, "steps": student.sampler.num_steps}
    for seed in firsts:
        yield told | {"seed": seed}, partial(pictures, seed), texts


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
