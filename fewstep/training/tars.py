"""Tar shards as webdataset has them: members KEY.jpg, KEY.txt and so on make the sample of KEY.

Archives are read member by member; nothing is unpacked and nothing in them is run.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fewstep.training.lines import decoded, parsed, text_of


def caption_of(file: Path, key: str, members: Mapping[str, Callable[[], bytes]]) -> str:
    """The text of KEY.txt or KEY.json.  Raises ValueError if there is neither, or no text in it."""
    if ".txt" in members:
        return decoded(members[".txt"](), f"{file}, {key}.txt").strip()
    where = f"{file}, {key}.json"
    if ".json" not in members:
        raise ValueError(
            f"{file}: {key} has no caption: put {key}.txt or {key}.json right beside the picture (tar --sort=name)"
        )
    return text_of(parsed(decoded(members[".json"](), where), where), where).strip()


def samples(file: Path) -> Iterator[tuple[str, dict[str, Callable[[], bytes]]]]:
    """Each key with what reads its members, by extension; a key's members lie one after the other.

    Members can be read until the next key is asked for.
    """
    key, members = "", {}
    with _readable(file), tarfile.open(file, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it remembers millions
            folder, slash, name = member.name.rpartition("/")
            stem, dot, kind = name.partition(".")
            if folder + slash + stem != key:
                if members:
                    yield key, members
                key, members = folder + slash + stem, {}
            if member.isfile():
                members[(dot + kind).lower()] = _reader(file, tar, member)
        if members:
            yield key, members


def _reader(file: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    def read() -> bytes:
        with _readable(file):
            opened = tar.extractfile(member)
            assert opened is not None  # a plain file
            return opened.read()

    return read


class _readable:
    """Within it, what is wrong with a tar file is said as one ValueError."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, tarfile.TarError):
            raise ValueError(
                f"{self.file} cannot be read as a tar file ({error}); shards are whole and not compressed"
            ) from error
