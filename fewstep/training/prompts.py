"""The prompts of a run: a tuple where they are few, a file of texts with the offset of each where they are many."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import overload

import numpy

from fewstep.files import write_text
from fewstep.training.cache import INDEX, cache_folder, fingerprint_of, stamps
from fewstep.training.checkpoint import PROMPTS
from fewstep.training.sources import text_files, texts_in

SMALL = 2**24
"""Characters of text that are held in memory; above, texts are read from the disk one by one."""
SCHEMA = 1
LISTED = "prompts.jsonl"
"""A run's copy of prompts that lines cannot hold."""


def read_prompts(path: str | Path) -> Sequence[str]:
    """The prompts of a file, or of a folder of shards; `sources.texts_in` says which.

    Raises FileNotFoundError if there is no such file and ValueError if it holds no prompt or cannot be read.
    """
    path = Path(path)
    files = text_files(path)
    prompts = kept(chain.from_iterable(map(texts_in, files)), files)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one per line")
    return prompts


def kept(texts: Iterable[str], files: Sequence[Path], what: str = "prompts") -> Sequence[str]:
    """A tuple of texts if they are few; else they are written once into the user's cache and read from there.

    files: where they come from; changed ones are read again.  what: tells several kinds of text in them apart.
    """
    folder = cache_folder() / "texts" / fingerprint_of({"schema": SCHEMA, "what": what, "files": stamps(files)})
    if folder.is_dir():
        return Texts(folder)
    coming, first, size = iter(texts), [], 0
    for text in coming:
        first.append(text)
        size += len(text)
        if size > SMALL:
            return store_texts(chain(first, coming), folder)
    return tuple(first)


class Texts(Sequence[str]):
    """Texts in a folder: all of them with a line feed between, and where each begins.  Only what is asked for is read.

    Raises ValueError if the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            self._count, self._line_feeds = int(index["count"]), bool(index["line_feeds"])
            # Plain reads: of a mapping, every page ever touched would count as memory of this process.
            self._texts, self._offsets = ((folder / name).open("rb", buffering=0) for name in ("texts", "offsets"))
            begin, end = self._span(self._count - 1)
            if end - 1 != (folder / "texts").stat().st_size or begin >= end:
                raise ValueError("it is cut off")
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{folder} is damaged ({error}); delete it, and the texts are read anew") from error

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._count)))
        if not -self._count <= index < self._count:
            raise IndexError(f"text {index} of {self._count}")
        begin, end = self._span(index % self._count)
        self._texts.seek(begin)
        return self._texts.read(end - 1 - begin).decode("utf-8")

    def _span(self, index: int) -> tuple[int, int]:
        """Where a text begins, and the next one would."""
        self._offsets.seek(8 * index)
        begin, end = numpy.frombuffer(self._offsets.read(16), "<i8")
        return int(begin), int(end)

    def blocks(self) -> Iterator[bytes]:
        """What `text_blocks` gives of them, a mebibyte at a time."""
        for name in ("texts", "offsets") if self._line_feeds else ("texts",):
            with (self.folder / name).open("rb") as file:
                while block := file.read(2**20):
                    yield block


def store_texts(texts: Iterable[str], folder: Path) -> Texts:
    """Write texts into a folder that appears whole or not at all; another process may have been faster."""
    writing = folder.parent / f".writing-{os.getpid()}-{folder.name}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    count, at, line_feeds = 0, 0, False
    with (writing / "texts").open("wb") as held, (writing / "offsets").open("wb") as offsets:
        for text in texts:
            data = text.encode("utf-8")
            held.write(b"\n" + data if count else data)
            offsets.write(at.to_bytes(8, "little"))
            at += len(data) + 1
            count += 1
            line_feeds |= "\n" in text
        offsets.write(at.to_bytes(8, "little"))
    write_text(writing / INDEX, json.dumps({"schema": SCHEMA, "count": count, "line_feeds": line_feeds}) + "\n")
    try:
        os.replace(writing, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(writing)
    return Texts(folder)


def text_hash(texts: Sequence[str]) -> str:
    """A SHA-256 of texts in their order."""
    digest = sha256()
    for block in text_blocks(texts):
        digest.update(block)
    return digest.hexdigest()


def text_blocks(texts: Sequence[str]) -> Iterator[bytes]:
    """What hashes of texts are of: all of them joined by line feeds, and, where they hold some, their offsets."""
    if isinstance(texts, Texts):
        yield from texts.blocks()
        return
    yield "\n".join(texts).encode()
    if any("\n" in text for text in texts):
        yield numpy.cumsum([0, *(len(text.encode()) + 1 for text in texts)], dtype="<i8").tobytes()


# -- a run's copy -------------------------------------------------------------------------------------------------


def write_copy(prompts: Sequence[str], run: Path) -> None:
    """Keep prompts in a run's folder, so that their file may move.  Millions are not copied: their file must stay."""
    if isinstance(prompts, Texts):
        return
    if all(prompt.splitlines() == [prompt] for prompt in prompts):
        write_text(run / PROMPTS, "\n".join(prompts) + "\n")
    else:
        write_text(run / LISTED, "".join(json.dumps({"text": p}, ensure_ascii=False) + "\n" for p in prompts))


def copy_in(run: Path) -> Path | None:
    """The copy that a run's folder holds, if it does."""
    return next((run / name for name in (PROMPTS, LISTED) if (run / name).is_file()), None)
