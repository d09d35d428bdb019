"""Rows of tensors in a folder of safetensors files, written one after the other and read row by row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fewstep.training.checkpoint import write_tensors

OPEN = 4
"""Files held open; of many, hardly one is met again soon, and to open one takes less than to read a row."""
DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""By safetensors' names."""


class Shards:
    """`count` rows in files of `size` rows each (the last may hold fewer), named by their first row.

    mark: metadata that each file carries; one with other metadata does not belong here.
    Files appear whole or not at all, so two processes that write the same rows do no harm.
    """

    def __init__(self, folder: Path, count: int, size: int, mark: Mapping[str, str] | None = None) -> None:
        self.folder, self.count, self.size, self.mark = folder, count, size, mark
        self._file = lru_cache(maxsize=OPEN)(lambda start: _Rows(self.path(start)))

    def starts(self) -> range:
        """The first row of each file."""
        return range(0, self.count, self.size)

    def rows(self, start: int) -> range:
        """The rows of the file that begins with row `start`."""
        return range(start, min(start + self.size, self.count))

    def path(self, start: int) -> Path:
        """Where the file that begins with row `start` is."""
        return self.folder / f"{start:08d}.safetensors"

    def write(self, start: int, tensors: Mapping[str, Tensor]) -> None:
        """Write one file, atomically."""
        write_tensors(self.path(start), tensors, self.mark)

    def whole(self, start: int) -> bool:
        """Whether the file is there, and neither cut off nor written for fewer rows.

        Raises ValueError for one with another mark.
        """
        try:
            opened = self._open(start)
            # Rows of one tensor: pairs keep their first noise beside them.
            held = max((shape[0] for shape in self._shapes(opened).values() if shape), default=0)
        except (FileNotFoundError, SafetensorError):
            return False
        return held >= len(self.rows(start))

    def shapes(self, start: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape of a file's tensors."""
        return self._shapes(self._open(start))

    def tensor(self, start: int, name: str) -> Tensor:
        """All that a file holds of one tensor."""
        return self._open(start).get_tensor(name)

    def row(self, index: int, *names: str) -> dict[str, Tensor]:
        """One row of these tensors, or of all, each [1, ...]; only its bytes are read.

        Raises ValueError that names a file which is gone or damaged.
        """
        at = index % self.size
        try:
            opened = self._file(index - at)
            return {name: opened.row(name, at) for name in names or opened.tensors}
        except (OSError, ValueError, KeyError) as error:
            raise self.damage(index, str(error)) from error

    def damage(self, index: int, why: str) -> ValueError:
        """The error for a row that cannot be read."""
        path = self.path(index - index % self.size)
        return ValueError(f"{path} is damaged ({why}); delete it and start again: only its rows are made anew")

    def _open(self, start: int) -> Any:
        path = self.path(start)
        opened = safe_open(path, "pt")
        if self.mark is not None and opened.metadata() != dict(self.mark):
            raise ValueError(f"{path} belongs to other data than its folder does; delete it and start again")
        return opened

    @staticmethod
    def _shapes(opened: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


class _Rows:
    """A file of which single rows are read.

    By plain reads: pages of a mapping count as memory, and safetensors 0.8 loses 64 bytes with each tensor that it
    makes, which are gigabytes in the end.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        length = int.from_bytes(self._file.read(8), "little")
        self.tensors: dict[str, Any] = json.loads(self._file.read(length))
        self.tensors.pop("__metadata__", None)
        self._begin = 8 + length

    def __del__(self) -> None:
        if "_file" in vars(self):
            self._file.close()

    def row(self, name: str, at: int) -> Tensor:
        """Row `at` of a tensor, [1, ...].  Raises ValueError if the file ends before."""
        told = self.tensors[name]
        begin, end = told["data_offsets"]
        size = (end - begin) // told["shape"][0]
        self._file.seek(self._begin + begin + at * size)
        row = torch.empty((1, *told["shape"][1:]), dtype=DTYPES[told["dtype"]])
        if self._file.readinto(row.flatten().view(torch.uint8).numpy().data) < size:
            raise ValueError("it is cut off")
        return row
