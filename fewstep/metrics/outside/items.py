"""Which pictures or videos a benchmark is of, what they are called, and the prompts they belong to."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fewstep.metrics.outside.contract import Item
from fewstep.metrics.outside.figures import STYLES

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
VIDEOS = (".mp4", ".gif")
PER_PROMPT = 4
"""Pictures of each of GenEval's prompts."""
VIDEOS_PER_PROMPT = 5
"""That VBench reads; in the dimension of flickering it has 25 drawn, of which a filter keeps those that do not move."""
VIDEO = re.compile(r"(?P<prompt>.+)-(?P<index>0|[1-9][0-9]*)")


def of_styles(prompts: Path) -> list[Item]:
    """HPSv2's, from a folder of anime.json to photo.json, lists of prompts: anime/00000 and so on.

    Names are without their endings.  Raises FileNotFoundError or ValueError for files that are not like that.
    """
    if not prompts.is_dir():
        raise FileNotFoundError(
            f"no folder of prompts at {prompts}: {', '.join(f'{s}.json' for s in STYLES)} are in it"
        )
    items = []
    for style in STYLES:
        texts = _json((prompts / f"{style}.json").read_text(encoding="utf-8"), prompts / f"{style}.json")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{prompts / style}.json is no list of prompts")
        items += [Item(f"{style}/{i:05}", text, 0, {"style": style}) for i, text in enumerate(texts)]
    return items


def of_tasks(prompts: Path) -> list[Item]:
    """GenEval's, from its evaluation_metadata.jsonl: 00000/samples/0000 to 00000/samples/0003, and so on."""
    items = []
    for i, line in enumerate(prompts.read_text(encoding="utf-8").splitlines()):
        found = _json(line, prompts)
        if not isinstance(found, dict) or not {"tag", "prompt"} <= set(found):
            raise ValueError(f"line {i + 1} of {prompts} is no prompt of GenEval: it wants `tag` and `prompt`")
        items += [Item(f"{i:05}/samples/{k:04}", found["prompt"], k, found) for k in range(PER_PROMPT)]
    return items


def of_lines(prompts: Sequence[str]) -> list[Item]:
    """A picture of each prompt, 00000 and so on; a prompt that is there again has the next index."""
    seen: dict[str, int] = {}
    items, width = [], max(5, len(str(len(prompts) - 1)))  # so that the order of names is that of numbers
    for i, prompt in enumerate(prompts):
        items.append(Item(f"{i:0{width}}", prompt, seen.get(prompt, 0)))
        seen[prompt] = items[-1].index + 1
    return items


def in_order(folder: Path, items: Sequence[Item]) -> list[Item]:
    """The pictures of a folder in the order of their names, one for each item; ValueError for another number."""
    files = _pictures(folder)
    if len(files) != len(items):
        raise ValueError(f"{len(items)} prompts for the {len(files)} images in {folder}; one line each is needed")
    return [replace(item, file=path.name) for path, item in zip(files, items)]


def by_name(folder: Path, items: Sequence[Item]) -> list[Item]:
    """Those items that are in a folder, with their endings.

    Raises ValueError if there are none, or a picture beside them that belongs to none: a wrong name would be left out
    of the figure and not be missed.
    """
    known, found = {item.file: item for item in items}, []
    for parent in sorted({(folder / item.file).parent for item in items}):
        for path in _pictures(parent) if parent.is_dir() else ():
            stem = path.relative_to(folder).with_suffix("").as_posix()
            if stem not in known:
                raise ValueError(f"{path} belongs to no prompt; names are as {items[0].file}.png")
            found.append(replace(known.pop(stem), file=path.relative_to(folder).as_posix()))
    if not found:
        raise ValueError(f"no image in {folder} has a name of this benchmark, as {items[0].file}.png")
    return found


def of_videos(folder: Path) -> list[Item]:
    """VBench's, whose names are their prompts: PROMPT-0.mp4 to PROMPT-4.mp4.

    Raises ValueError for any other, and for two files of one name, which would count one draw twice.
    """
    items: list[Item] = []
    named: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEOS):
        found = VIDEO.fullmatch(path.stem)
        if found is None:
            raise ValueError(
                f"{path} is not called PROMPT-NUMBER{path.suffix}, as VBench wants it, no zeros before a number"
            )
        if named.setdefault(path.stem, path) != path:
            raise ValueError(
                f"{named[path.stem]} and {path.name} are both number {found['index']} of one prompt; keep one"
            )
        if int(found["index"]) < VIDEOS_PER_PROMPT:
            items.append(Item(path.name, found["prompt"], int(found["index"])))
    if not items:
        raise ValueError(f"no video in {folder}: {', '.join(VIDEOS)} are read")
    return items


def _pictures(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)


def _json(text: str, path: Path) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
