"""What is encoded once and kept: named tensors row by row, in shards, in a folder of the user's cache.

The folder is named by a hash of everything that its rows depend on, so another encoder, other prompts or another
version of this format have another folder.  It holds index.json, for people and for what is to be known before a shard
is opened, and the shards.  Each row has its checksum, looked at whenever the row is read.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.environment import cache_folder
from fewstep.files import write_text
from fewstep.sampling import Advance
from fewstep.training.shards import Shards

log = logging.getLogger("fewstep")

SCHEMA = 1
SHARD = 1024
"""Rows in a file; what a killed run encodes again."""
INDEX, CHECKSUM = "index.json", "checksum"


@dataclass(frozen=True)
class Share:
    """This process's part of what several do together: every `of`-th shard from number `rank` on.

    together: ends when all have done their part, with an error on all if there was one on any.
    """

    rank: int = 0
    of: int = 1
    together: Callable[[], AbstractContextManager[None]] = nullcontext


def fingerprint_of(card: Mapping[str, Any]) -> str:
    """A hash of plain data."""
    return sha256(json.dumps(card, sort_keys=True, default=str).encode()).hexdigest()


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of files: differ if one was changed."""
    return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


class Store:
    """Rows of named tensors in the folder <cache>/<kind>/<hash of card>.

    card: everything that the rows depend on, as plain data.  note: what else people may want to know of them.
    `begin` makes or opens it; before, only `index` and `planned` can be asked.
    """

    shards: Shards

    def __init__(self, kind: str, card: Mapping[str, Any], note: Mapping[str, Any] | None = None) -> None:
        card = {"schema": SCHEMA, **card}
        self._told = {**card, **(note or {})}
        self.fingerprint = fingerprint_of(card)
        self.folder = cache_folder() / kind / self.fingerprint

    def index(self) -> dict[str, Any] | None:
        """What `begin` wrote; None if the folder is new.  Raises ValueError if it is damaged."""
        path = self.folder / INDEX
        if not path.is_file():
            return None
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete its folder, and all is encoded anew") from error

    def planned(self, row: Mapping[str, Tensor], count: int) -> dict[str, Any]:
        """The index of `count` rows like this one, each of its tensors [1, ...]."""
        tensors = {k: {"shape": list(v.shape[1:]), "dtype": str(v.dtype).split(".")[1]} for k, v in row.items()}
        size = sum(value.nbytes for value in row.values())
        return {**self._told, "count": count, "shard": SHARD, "row_bytes": size, "tensors": tensors}

    def begin(self, index: Mapping[str, Any]) -> None:
        """Make the folder with this index, or open it.  Raises ValueError if the disk has no room for a new one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / INDEX).is_file():
            needed, free = index["count"] * index["row_bytes"], shutil.disk_usage(self.folder).free
            if needed > free:
                raise ValueError(
                    f"{index['count']} rows of {index['row_bytes']} bytes take {needed / 1e9:.1f} GB, and "
                    f"{self.folder} has {free / 1e9:.1f} GB left; make room, or set FEWSTEP_CACHE to another folder"
                )
            write_text(self.folder / INDEX, json.dumps(index, indent=1, default=str) + "\n", shared=True)
        self.shards = Shards(self.folder, index["count"], index["shard"], {"fingerprint": self.fingerprint})

    def total(self, share: Share) -> int:
        """The number of rows in this process's share."""
        return sum(len(self.shards.rows(start)) for start in self.shards.starts()[share.rank :: share.of])

    def missing(self, share: Share, done: Advance) -> Iterator[range]:
        """The rows of each shard of this process's share that is still to be written.

        done: told the number of rows that are there already.  A shard that is cut off is reported, and missing.
        """
        for start in self.shards.starts()[share.rank :: share.of]:
            rows, path = self.shards.rows(start), self.shards.path(start)
            if self.shards.whole(start):
                done(len(rows))
                continue
            if path.is_file():
                log.warning("%s is damaged; its rows are encoded again", path)
            yield rows

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the shard that begins with row `start`, atomically."""
        rows = len(self.shards.rows(start))
        assert all(len(value) == rows for value in tensors.values())
        sums = [_checksum({k: v[i : i + 1] for k, v in tensors.items()}) for i in range(rows)]
        self.shards.write(start, {**tensors, CHECKSUM: torch.tensor(sums)})

    def row(self, index: int) -> dict[str, Tensor]:
        """One row, each tensor [1, ...].  Raises ValueError for one whose bytes are not those that were written."""
        found = self.shards.row(index)
        if _checksum(found) != int(found.pop(CHECKSUM)):
            raise self.shards.damage(index, "bytes differ from what was written")
        return found

    def checksums(self) -> Iterator[bytes]:
        """Those of all rows, shard by shard."""
        for start in self.shards.starts():
            yield self.shards.tensor(start, CHECKSUM).numpy().tobytes()


def _checksum(row: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(row.keys() - {CHECKSUM}):
        total = zlib.crc32(row[name].detach().contiguous().cpu().view(torch.uint8).numpy().data, total)
    return total
