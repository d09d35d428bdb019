"""Where prompts and captioned pictures come from: text, JSONL, parquet, tar shards, folders; all of them as streams."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fewstep.training.lines import FIELDS, json_rows, lines_of, text_of
from fewstep.training.tars import caption_of, samples

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = "metadata.jsonl"


@dataclass(frozen=True)
class Picture:
    """A picture's bytes, to be read when they are needed, and its caption.  name: for messages."""

    name: str
    caption: str
    read: Callable[[], bytes]


def texts_in(file: Path) -> Iterator[str]:
    """The texts of a file in their order, without white space around them; blank ones are left out.

    .jsonl, .json: one object a line with "text", "prompt" or "caption".  .parquet: a column of such a name; needs
    pyarrow.  .tar: KEY.txt or KEY.json of each KEY.  Anything else: one text a line, UTF-8.
    Raises ValueError that names the file, the place and the remedy.
    """
    kinds = {".jsonl": _jsonl, ".json": _jsonl, ".parquet": _parquet, ".tar": _tar_texts}
    for text in kinds.get(file.suffix.lower(), _lines)(file):
        if text := text.strip():
            yield text


def text_files(path: Path) -> list[Path]:
    """The file itself, or the .jsonl, .parquet or .tar shards of a folder, by name.

    Raises FileNotFoundError if there is no such file and ValueError for a folder without shards or with several kinds.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(
            f"no prompt file at {path}; it holds one prompt per line, UTF-8, or is .jsonl, .parquet or .tar"
        )
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in (".jsonl", ".parquet", ".tar"))
    kinds = sorted({p.suffix.lower() for p in found})
    if len(kinds) != 1:
        held = (
            f"{' and '.join(kinds)} files; name one file" if kinds else "no .jsonl, .parquet or .tar shard of prompts"
        )
        raise ValueError(f"{path} holds {held}, or a folder with shards of one kind")
    return found


def tar_shards(path: Path) -> list[Path]:
    """The tar file itself, or those of a folder, by name; none if it is a folder of pictures."""
    if path.is_file() and path.suffix.lower() == ".tar":
        return [path]
    return sorted(path.glob("*.tar"))


def pictures_in(path: Path) -> Iterator[Picture]:
    """The captioned pictures of tar shards (KEY.jpg, .png or .webp and KEY.txt or KEY.json) or of a folder.

    Raises FileNotFoundError or ValueError that names the first picture without a caption.
    """
    shards = tar_shards(path)
    for shard in shards:
        yield from _tar_pictures(shard)
    if not shards:
        for file, caption in captioned_pictures(path):
            yield Picture(str(file), caption, file.read_bytes)


def captioned_pictures(folder: Path) -> list[tuple[Path, str]]:
    """The pictures of a folder with their captions, sorted by name.

    Captions come from metadata.jsonl ({"file_name": ..., "text": ...}, as `datasets` has it), else from NAME.txt beside
    NAME.png.  Raises FileNotFoundError or ValueError that names the first picture without one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}; --data takes a folder of pictures, a .tar or a folder of .tar")
    listed = folder / CAPTIONS
    if listed.is_file():
        return sorted((folder / row["file_name"], row["text"]) for row in _captions(listed))
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}) and no .tar")
    return [(path, _caption_beside(path)) for path in found]


def _captions(listed: Path) -> Iterator[dict[str, str]]:
    for where, row in json_rows(listed):
        if not all(isinstance(row.get(name), str) for name in ("file_name", "text")):
            raise ValueError(f'{where}: it must hold "file_name" and "text"')
        yield row


def _caption_beside(path: Path) -> str:
    text = path.with_suffix(".txt")
    if not text.is_file():
        raise ValueError(f"{path} has no caption: write {text.name} beside it, or a {CAPTIONS} in the folder")
    return text.read_text(encoding="utf-8").strip()


def _lines(file: Path) -> Iterator[str]:
    for line in lines_of(file):
        yield from line.splitlines()  # some end lines by a carriage return or a character of Unicode's


def _jsonl(file: Path) -> Iterator[str]:
    for where, row in json_rows(file):
        yield text_of(row, where)


def _parquet(file: Path) -> Iterator[str]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{file}: parquet files are read by pyarrow, which is not here: pip install pyarrow")
    arrow: Any = importlib.import_module("pyarrow")
    parquet: Any = importlib.import_module("pyarrow.parquet")
    try:
        with parquet.ParquetFile(file) as opened:
            columns = {field.name: str(field.type) for field in opened.schema_arrow}
            name = next((name for name in FIELDS if columns.get(name) in ("string", "large_string")), None)
            if name is None:
                held = ", ".join(f"{column} ({kind})" for column, kind in columns.items())
                raise ValueError(f"{file} has no column of strings named {', '.join(FIELDS)}; it has {held}")
            for batch in opened.iter_batches(columns=[name], batch_size=1024):
                yield from (text or "" for text in batch.column(0).to_pylist())  # null is as good as blank
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as parquet: {error}") from error


def _tar_texts(file: Path) -> Iterator[str]:
    for key, members in samples(file):
        if ".txt" in members or ".json" in members:
            yield caption_of(file, key, members)


def _tar_pictures(file: Path) -> Iterator[Picture]:
    for key, members in samples(file):
        kind = next((kind for kind in members if kind in PICTURES), None)
        if kind is not None:
            yield Picture(f"{file}, {key}{kind}", caption_of(file, key, members), members[kind])
