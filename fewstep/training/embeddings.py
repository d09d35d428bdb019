"""Prompts to conditions, once: in memory where they are few, else in a cache on the disk that training streams from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from fewstep.bar import bar
from fewstep.sampling import Advance
from fewstep.teachers.base import PromptEncoder, Teacher
from fewstep.teachers.folders import contents
from fewstep.training.cache import CHECKSUM, Share, Store, fingerprint_of
from fewstep.training.prompts import text_hash
from fewstep.types import Condition

Where = Literal["auto", "memory", "disk"]
PIECE = 16
"""Prompts encoded between two words of progress."""
MEMORY = 2**30
"""Bytes of conditions that `auto` keeps in memory."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The shapes that all rows of a set have once they are put together.

    Parts of a set may be encoded to different lengths, the first dimension of a row: shorter ones are padded with zeros
    to the longest.  Where a part says how many tokens of "text" each row has ("length"), the set says so of all.
    """

    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Shape]]) -> Layout:
        """That of parts with rows of these shapes.  Raises ValueError if they cannot be put together."""
        shapes: dict[str, Shape] = {}
        for part in parts:
            for name, shape in part.items():
                known = shapes.setdefault(name, shape)
                if known[1:] != shape[1:] or len(known) != len(shape):
                    raise ValueError(
                        f"the text encoder gave rows of {name!r} shaped {list(known)} and {list(shape)}; they may "
                        "differ in length, the first dimension, only"
                    )
                shapes[name] = max(known, shape)
        return cls(shapes)

    def fit(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rows [B, ...] of one part as those of the set."""
        if not rows:  # there is no empty prompt
            return {}
        made = {name: _longer(rows[name], self.shapes[name]) for name in rows}
        if "length" in self.shapes and "length" not in rows:
            count, length = rows["text"].shape[:2]
            made["length"] = torch.full((count,), length)
        return made

    def joined(self, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The rows of several parts, one after the other."""
        fitted = [self.fit(part) for part in parts]
        return {name: torch.cat([part[name] for part in fitted]) for name in fitted[0]}


class StoredConditions:
    """Conditions on the disk, of which a batch's rows are read: the same numbers as in memory.

    store: the prompts' rows, then the empty one's if there is one.
    """

    def __init__(self, store: Store, prompts: int) -> None:
        self._store = store
        self._layout = Layout.of(_shapes(store.shards.shapes(start)) for start in store.shards.starts())
        self._null = self._layout.fit(store.row(prompts)) if store.shards.count > prompts else {}

    def __getitem__(self, rows: Tensor) -> Condition:
        """The condition of the rows [B] long, in their order."""
        return Condition(self._layout.joined([self._store.row(row) for row in rows.tolist()]), self._null)


class Encoder:
    """A prompt encoder for whole sets, with a bar: what it gives may be a `Condition` or lie on the disk.

    encode: the teacher's.  card: what tells its rows from another's, as plain data; see `card_of`.
    where: `auto` goes to the disk if the set would take more than MEMORY, judged by its first prompts.
    """

    def __init__(
        self,
        encode: PromptEncoder,
        card: Mapping[str, Any],
        *,
        note: Mapping[str, Any] | None = None,
        where: Where = "auto",
        console: Console | None = None,
        share: Share | None = None,
    ) -> None:
        self._encode, self._card, self._note = encode, card, note
        self._where, self._console, self._share = where, console, share or Share()

    def __call__(self, prompts: Sequence[str]) -> Condition | StoredConditions:
        """Raises ValueError for what is not finite or cannot be put together, and for a damaged cache."""
        if self._where != "memory":
            card = {"encoder": self._card, "prompts": text_hash(prompts)}
            store = Store("prompts", card, self._note)
            index = store.index() or self._planned(store, prompts)
            if self._where == "disk" or index["row_bytes"] * len(prompts) > MEMORY:
                store.begin(index)
                return self._stored(prompts, store)
        with bar("encoding prompts", len(prompts), self._console) as done:
            return self._encoded(prompts, done)

    def _planned(self, store: Store, prompts: Sequence[str]) -> dict[str, Any]:
        first = self._piece(prompts[:PIECE])  # several: one alone may be short
        return store.planned(first[:1].tensors, len(prompts) + bool(first.null))

    def _stored(self, prompts: Sequence[str], store: Store) -> StoredConditions:
        """Encode what the cache does not hold yet."""
        with self._share.together(), bar("encoding prompts", store.total(self._share), self._console) as done:
            self._fill(prompts, store, self._share, done)
        # Nothing is left, unless other processes have caches of their own.
        self._fill(prompts, store, Share(), lambda count: None)
        return StoredConditions(store, len(prompts))

    def _fill(self, prompts: Sequence[str], store: Store, share: Share, done: Advance) -> None:
        for rows in store.missing(share, done):
            some = prompts[rows.start : rows.stop]
            made = self._encoded(some or prompts[-1:], done)
            parts = [made.tensors] if some else []
            if rows.stop > len(prompts):
                parts.append(made.null)
            store.write(rows.start, joined(parts))
            done(len(rows) - max(1, len(some)))  # the empty prompt beside others

    def _encoded(self, prompts: Sequence[str], done: Advance) -> Condition:
        """Prompts piece by piece, put together."""
        parts = []
        for start in range(0, len(prompts), PIECE):
            some = prompts[start : start + PIECE]
            parts.append(self._piece(some))
            done(len(some))
        layout = Layout.of(_shapes(rows) for part in parts for rows in (part.tensors, part.null))
        return Condition(layout.joined([part.tensors for part in parts]), layout.fit(parts[0].null))

    def _piece(self, prompts: Sequence[str]) -> Condition:
        made = self._encode(prompts)
        bad = [k for k, v in made.tensors.items() if v.is_floating_point() and not v.isfinite().all()]
        if bad:
            raise ValueError(
                f"the text encoder gave non-finite values in {bad}; its weights are damaged or overflow in this dtype"
            )
        return made


def card_of(teacher: Teacher, prompts: Sequence[str], negative_prompt: str | None = None) -> dict[str, Any]:
    """What tells the conditions of this teacher from another's.

    The content of its encoders where they come from a folder, wherever that lies; else its name, its options and what
    it makes of the first two of the prompts.
    """
    options = {name: value for name, value in teacher.options.items() if name not in ("source", "revision")}
    card: dict[str, Any] = {"options": options, "negative_prompt": negative_prompt}
    if teacher.folder is not None:
        return card | {"weights": contents(teacher.folder, ("text_encoder", "tokenizer"))}
    made = teacher.encode(prompts[:2])
    seen = {name: value.double().flatten().tolist() for name, value in made.tensors.items()}
    return card | {"source": teacher.card.source, "made": fingerprint_of(seen)}


def note_of(teacher: Teacher) -> dict[str, Any]:
    """Where a teacher comes from, for people."""
    return {"source": teacher.card.source, "revision": teacher.card.revision}


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Parts of a set as one: each [B, ...]."""
    return Layout.of(map(_shapes, parts)).joined(parts)


def _shapes(rows: Mapping[str, Any]) -> dict[str, Shape]:
    """Of one row each, given tensors or their shapes."""
    shapes = {name: tuple(getattr(value, "shape", value)) for name, value in rows.items() if name != CHECKSUM}
    return {name: shape[1:] for name, shape in shapes.items()}


def _longer(rows: Tensor, shape: Shape) -> Tensor:
    """Rows [B, L, ...] padded with zeros to [B, *shape]."""
    missing = shape[0] - rows.shape[1] if shape else 0
    return pad(rows, (0, 0) * (rows.ndim - 2) + (0, missing)) if missing else rows
