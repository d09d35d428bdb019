"""Pictures scored by a package of another environment: those of a folder, or a run's student's.

Every measurement is one line of JSON with all that its figures depend on, as those of protocols are.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from fewstep.bar import bar
from fewstep.environment import check_device, describe
from fewstep.files import write_text
from fewstep.measuring import BATCH, FILE, append
from fewstep.metrics.features import file_sha256
from fewstep.metrics.outside.contract import CONTRACT, Answer, Item, Request
from fewstep.metrics.outside.items import by_name, in_order, of_lines, of_styles, of_tasks, of_videos
from fewstep.metrics.outside.process import Place, ask, check_place
from fewstep.metrics.outside.scores import Score, find_score, is_ours
from fewstep.metrics.protocols import protocol_hash
from fewstep.pictures import picture
from fewstep.sampling import Advance, Student
from fewstep.students import load_student
from fewstep.training.checkpoint import CONFIG
from fewstep.training.prompts import read_prompts, text_hash

DAY = 86_400.0


@dataclass(frozen=True)
class Scoring:
    """What to score by, before the pictures are named.

    score: its name, or an adapter's file.  python: of the environment that has the package; by default this one's.
    prompts: as the score's `prompts` says.  options: of the adapter.  timeout: seconds of the whole work.
    """

    score: str
    python: Path = Path(sys.executable)
    prompts: Path | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    device: str = "auto"
    timeout: float = DAY


def score(
    target: Path,
    asked: Scoring,
    *,
    images: Path | None = None,
    seed: int = 50_000_000,
    which: Literal["best", "last"] = "best",
    batch_size: int | None = None,
    to: Path | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score, append a line to a file, and return what was written.

    target: a run folder, whose student makes the pictures of all prompts, or a folder of pictures or videos.
    images: of a run, made elsewhere.  seed: the picture of prompt i has the noise numbered seed + i.  to: by default
    figures.jsonl in the target.  The whole answer is written beside it before anything is made of it, in a file of its
    own.
    Raises ValueError, LookupError or OSError for what cannot be scored, before anything is sampled where possible: the
    adapter is asked without pictures first.  Pictures that were sampled before an error are kept, and where is said.
    """
    console, file = console or Console(stderr=True), to or target / FILE
    found = find_score(asked.score)
    place = Place(asked.python, found.adapter, f"That environment: {found.environment}")
    _check(target, found, asked, place)
    expected = _expected(found, asked.prompts)
    request = Request(found.name, images or target, (), asked.device, {**found.settings, **asked.options})
    if images is None and (target / CONFIG).is_file():
        if found.layout == "videos":
            raise ValueError(f"{found.name} is of videos, which are not sampled here: name a folder of them")
        console.print(f"{found.name}: looking for what it needs", highlight=False, markup=False, soft_wrap=True)
        ask(place, request, timeout=asked.timeout)
        student = load_student(target, which=which, device=asked.device)
        pictures = _sampled(student, expected, seed, batch_size, console)
        told = {"iteration": student.iteration, "steps": student.sampler.num_steps, "seed": seed}
    else:
        pictures = nullcontext(images or target)
        told = {"images": str(images or target)}
    file.parent.mkdir(parents=True, exist_ok=True)
    with pictures as folder:
        items = _items(found, folder, expected)
        suffix = _suffix(found, items)
        if suffix:
            said = f"{len(items)} of the {found.count} of {found.title}: its figures are named {found.title}{suffix}"
            console.print(said, highlight=False, markup=False, soft_wrap=True)
        with bar(found.name, len(items), console) as done:
            answer = ask(place, replace(request, folder=folder, items=items), timeout=asked.timeout, advance=done)
        shown = (images or target).resolve()
        record = {"name": shown.name, "folder": str(shown), **_described(found, asked, expected, answer), **told}
        kept = file.with_name(f"{file.stem}-{found.name}-{_digest(record, images or target, answer)}.json")
        write_text(kept, json.dumps(asdict(answer), ensure_ascii=False) + "\n")
        means = {name + suffix: mean for name, mean in found.summary(found.title, items, answer).items()}
        record |= {"answer": kept.name, "n": len(items), "figures": {name: mean.value for name, mean in means.items()}}
        record["intervals"] = {name: mean.interval for name, mean in means.items() if mean.interval}
        append(file, record)
    return record


def table(record: Mapping[str, Any]) -> str:
    """The figures as markdown, a row each, with the interval in which they lie with 95% confidence."""
    rows = [["figure", "value", "95% interval"], ["---"] * 3]
    for name, value in record["figures"].items():
        ends = record["intervals"].get(name)
        rows.append([name, f"{value:.5g}", "-" if ends is None else f"{ends[0]:.5g} to {ends[1]:.5g}"])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _check(target: Path, found: Score, asked: Scoring, place: Place) -> None:
    """Raises ValueError or FileNotFoundError.  A user's own adapter takes any option."""
    check_device(asked.device)
    check_place(place)
    if not asked.timeout > 0:
        raise ValueError(f"--timeout {asked.timeout:g} must be more than 0 seconds")
    unknown = sorted(set(asked.options) - set(found.options))
    known = "; ".join(f"{name}: {words}" for name, words in found.options.items())
    if is_ours(found) and unknown:
        raise ValueError(f"{found.name} has no option {unknown[0]!r}; it takes {known}")
    if found.required and not any(set(some) <= set(asked.options) for some in found.required):
        wanted = ", or ".join(" and ".join(f"--option {name}=" for name in some) for some in found.required)
        raise ValueError(f"{found.name} needs {wanted}; {known}")
    if not target.is_dir():
        raise FileNotFoundError(f"no run or folder of images at {target}")


def _expected(found: Score, prompts: Path | None) -> list[Item]:
    """All items of these prompts, their files without endings; none where names of videos are the prompts."""
    if found.layout == "videos":
        if prompts is not None:
            raise ValueError(f"{found.name} reads its prompts from the videos' names; leave --prompts out")
        return []
    if prompts is None:
        raise ValueError(f"{found.name} needs --prompts: {found.prompts}")
    if found.layout == "styles" and prompts.is_dir():
        items = of_styles(prompts)
    else:
        items = of_tasks(prompts) if found.layout == "tasks" else of_lines(read_prompts(prompts))
    if not items:
        raise ValueError(f"{prompts} holds no prompt")
    return items


def _items(found: Score, folder: Path, expected: Sequence[Item]) -> list[Item]:
    """What of the expected items is in a folder."""
    if found.layout == "videos":
        return of_videos(folder)
    return by_name(folder, expected) if expected[0].extra else in_order(folder, expected)


def _suffix(found: Score, items: Sequence[Item]) -> str:
    """What figures' names end in where the count or the prompts are not the published ones: @ and the count."""
    published = found.layout in ("lines", "videos") or all(item.extra for item in items)
    return "" if found.count is None or (published and len(items) == found.count) else f"@{len(items)}"


@contextmanager
def _sampled(
    student: Student, expected: Sequence[Item], seed: int, batch_size: int | None, console: Console
) -> Iterator[Path]:
    """A folder of the student's pictures of all items.  It goes at the end, but not after an error: they took hours."""
    folder = Path(tempfile.mkdtemp(prefix="fewstep-"))
    try:
        with bar("sampling", len(expected), console) as done:
            _sample(student, expected, folder, seed, batch_size, done)
    except BaseException:
        shutil.rmtree(folder)
        raise
    try:
        yield folder
    except BaseException:
        said = f"the {len(expected)} sampled pictures are kept: --images {folder} scores them"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        raise
    shutil.rmtree(folder)


def _sample(
    student: Student,
    expected: Sequence[Item],
    folder: Path,
    seed: int,
    batch_size: int | None,
    advance: Advance,
) -> None:
    """Write the student's pictures of all items, a batch at a time.  Raises ValueError for samples that are none."""
    for start in range(0, len(expected), BATCH):
        part = expected[start : start + BATCH]
        prompts = [item.prompt for item in part]
        drawn = student.sample(len(part), prompts, seed + start, batch_size=batch_size, progress=advance)
        if drawn.ndim != 4 or drawn.shape[1] not in (1, 3):
            raise ValueError(f"the student makes samples of shape {list(drawn.shape[1:])}, which are no pictures")
        for item, image in zip(part, drawn):
            path = folder / f"{item.file}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(image).save(path)


def _described(found: Score, asked: Scoring, expected: Sequence[Item], answer: Answer) -> dict[str, Any]:
    """What a record says besides its figures.  Its hash is of all that makes figures comparable.

    The options that an adapter of ours takes only name places; what lies there is told by the weights' hashes.
    """
    own = not is_ours(found)
    protocol: dict[str, Any] = {
        "score": found.name,
        "contract": CONTRACT,
        "adapter": file_sha256(found.adapter) if own else found.version,
        "options": {**found.settings, **(asked.options if own else {})},
        "prompts": text_hash([item.prompt for item in expected]) if expected else None,
        "package": answer.package,
        "weights": dict(sorted(answer.weights.items())),
    }
    return {
        "protocol": found.name,
        "protocol_hash": protocol_hash(protocol),
        "scored": protocol,
        "prompts": None if asked.prompts is None else str(asked.prompts),
        "seconds": answer.seconds,
        "environment": describe(),
    }


def _digest(record: Mapping[str, Any], pictures: Path, answer: Answer) -> str:
    """Of what a record is of and of the answer: another measurement's answer, which may lie beside it, has another."""
    told = {name: record.get(name) for name in ("protocol_hash", "seed", "iteration")}
    return protocol_hash({**told, "pictures": str(pictures.resolve()), "answer": asdict(answer)})[:12]
