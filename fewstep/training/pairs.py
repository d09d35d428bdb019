"""Noise and what the teacher's ODE makes of it: built once, in shards, for methods that regress on such pairs.

A folder of pairs holds pairs.json (what made them), prompts.json (pair i has number i mod their count) and shards
00000000.safetensors, ... named by their first pair.  Noise is not stored: that of pair i is the numbered noise of
seed + i, and each shard keeps its first one, so that another generator of random numbers would be noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.diffusion import ode
from fewstep.files import write_text
from fewstep.sampling import Advance, at_a_time, check_count, cycled, numbered_noise
from fewstep.teachers.base import Teacher
from fewstep.training.checkpoint import fingerprint
from fewstep.training.embeddings import StoredConditions
from fewstep.training.order import Order
from fewstep.training.shards import Shards
from fewstep.types import Condition, Pair

CARD, PROMPTS = "pairs.json", "prompts.json"
SHARD = 1000
"""Pairs in a file of a new folder; what a killed build makes again."""
FIRST_SEED = 2_000_000
"""Of the first pair by default: neither evaluations nor previews use these."""


@dataclass(frozen=True, kw_only=True)
class PairsCard:
    """What made a folder of pairs; two folders of equal cards and prompts hold the same pairs, but for rounding.

    teacher, weights: its source and the fingerprint of its network.  num_steps, guidance, solver: how it was sampled.
    """

    teacher: str
    weights: str
    shape: tuple[int, ...]
    num_steps: int
    guidance: float
    solver: str
    seed: int
    n: int
    negative_prompt: str | None = None
    shard: int  # pairs in a file

    def shards(self, folder: Path) -> Shards:
        """The files of its pairs."""
        return Shards(folder, self.n, self.shard)


def make_pairs(
    teacher: Teacher,
    out: str | Path,
    n: int,
    *,
    num_steps: int = 50,
    guidance: float | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    seed: int = FIRST_SEED,
    batch_size: int | None = None,
    progress: Advance = lambda count: None,
) -> PairsCard:
    """Sample n pairs of the teacher's deterministic ODE into the folder `out`; go on where an earlier call stopped.

    guidance: the teacher's own by default; distil with the same.  prompts: the teacher's own by default.  More pairs
    of the same settings extend a folder.  batch_size: sampled at a time, by default by their size.
    progress: called with the number of pairs made, or found there.
    Raises ValueError if the folder holds pairs of other settings, or other things.
    """
    check_request(out, n, num_steps, batch_size)
    prompts = tuple(teacher.prompts if prompts is None else prompts)
    if not prompts:
        raise ValueError(f"teacher {teacher.card.name!r} brings no prompts; give --prompts FILE, one prompt per line")
    if negative_prompt is not None:
        teacher = teacher.against(negative_prompt)
    scale, out = teacher.guidance if guidance is None else guidance, Path(out)
    card = PairsCard(
        teacher=teacher.card.source,
        weights=fingerprint(teacher.denoiser),
        shape=tuple(teacher.shape),
        num_steps=num_steps,
        guidance=float(scale),
        solver=teacher.solver,
        seed=seed,
        n=n,
        negative_prompt=negative_prompt,
        shard=SHARD,
    )
    card = _open(out, card, prompts)
    shards = card.shards(out)
    for start in shards.starts():
        rows = shards.rows(start)
        if shards.whole(start):
            progress(len(rows))
        else:
            made = _made(teacher, card, cycled(prompts, rows.start, rows.stop), start, batch_size, progress)
            shards.write(start, {"x0": made, "first_noise": _numbered(card, [start])})
    return card


def check_request(out: str | Path, n: int, num_steps: int, batch_size: int | None) -> None:
    """What of `make_pairs` can be wrong before a teacher is loaded.  Raises ValueError."""
    for name, value in (("n", n), ("num_steps", num_steps), ("batch_size", 1 if batch_size is None else batch_size)):
        check_count(name, value)
    out = Path(out)
    if out.exists() and not (out / CARD).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and holds no pairs; choose another --out")


def read_card(folder: str | Path) -> PairsCard:
    """What made the pairs of a folder.  Raises FileNotFoundError or ValueError if it holds no complete set."""
    folder = Path(folder)
    if not (folder / CARD).is_file():
        raise FileNotFoundError(f"no pairs at {folder}: {CARD} is missing; build them with `fewstep pairs`")
    try:
        found = json.loads((folder / CARD).read_text(encoding="utf-8"))
        card = PairsCard(**found | {"shape": tuple(found["shape"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / CARD} does not describe pairs ({error}); build them again") from error
    shards = card.shards(folder)
    ready = sum(len(shards.rows(start)) for start in shards.starts() if shards.whole(start))
    if ready < card.n:
        raise ValueError(f"{folder} holds {ready} of its {card.n} pairs; run the same `fewstep pairs` again")
    return card


class PairData:
    """Pairs as a pure function of the global sample index: row permutation(seed, i // N)[i % N], as for prompts.

    Shards are read row by row; no more than a micro-batch lies in memory.
    """

    def __init__(
        self, folder: Path, encode: Callable[[Sequence[str]], Condition | StoredConditions], seed: int
    ) -> None:
        self.card = read_card(folder)
        self.order = Order("pairs", seed, self.card.n)
        prompts = json.loads((folder / PROMPTS).read_text(encoding="utf-8"))
        self.digest = sha256("\n".join([json.dumps(asdict(self.card)), *prompts]).encode()).hexdigest()
        known = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        self._captions = torch.tensor([known[prompt] for prompt in prompts])
        self._conditions = encode(tuple(known))
        self._shards = self.card.shards(folder)
        if not torch.equal(self._shards.tensor(0, "first_noise"), _numbered(self.card, [0])):
            raise ValueError(
                f"the noise of {folder}'s pairs cannot be made again by this version of torch: build them anew"
            )

    def batch(self, sample_ids: Sequence[int], device: torch.device | str = "cpu") -> Pair:
        """The pairs of these global sample indices, float32."""
        rows = self.order.rows(sample_ids)
        cond = self._conditions[self._captions[rows % len(self._captions)]]
        x0 = torch.cat([self._shards.row(row, "x0")["x0"] for row in rows.tolist()]).float()
        return Pair(_numbered(self.card, rows.tolist()).to(device), x0.to(device), cond.to(device))


def _open(out: Path, card: PairsCard, prompts: Sequence[str]) -> PairsCard:
    """Make the folder, or check that it holds pairs of these settings; the card with the folder's size of shards."""
    text = json.dumps(list(prompts), indent=0, ensure_ascii=False) + "\n"
    if (out / CARD).is_file():
        old = json.loads((out / CARD).read_text(encoding="utf-8"))
        card = replace(card, shard=old.get("shard", card.shard))
        new: dict[str, Any] = json.loads(json.dumps(asdict(card)))
        changed = [f"{k}: {old.get(k)} -> {v}" for k, v in new.items() if k != "n" and old.get(k) != v]
        if (out / PROMPTS).read_text(encoding="utf-8") != text:
            changed.append("prompts")
        if old.get("n", 0) > card.n:
            changed.append(f"n: {old['n']} -> {card.n}")
        if changed:
            raise ValueError(
                f"{out} holds pairs of other settings; changed: {'; '.join(changed)}. Choose another --out, or give "
                "the old values"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / PROMPTS, text)
    write_text(out / CARD, json.dumps(asdict(card), indent=1) + "\n")
    return card


@torch.no_grad()
def _made(
    teacher: Teacher, card: PairsCard, prompts: list[str], start: int, batch_size: int | None, progress: Advance
) -> Tensor:
    """The samples of pairs start, start + 1, ... under these prompts, fp16."""
    denoiser, grid, parts = teacher.denoiser, teacher.grid(card.num_steps), []
    device = next((p.device for p in [*denoiser.parameters(), *denoiser.buffers()]), torch.device("cpu"))
    batch_size = at_a_time(teacher.shape) if batch_size is None else batch_size
    for first in range(0, len(prompts), batch_size):
        some = prompts[first : first + batch_size]
        rows = range(start + first, start + first + len(some))
        noise = denoiser.schedule.prior(_numbered(card, rows).to(device))
        cond = teacher.encode(some).to(device)
        x0 = ode(denoiser, noise, grid, cond, method=teacher.solver, guidance=card.guidance)
        if not x0.isfinite().all():
            raise ValueError(f"the teacher's samples {rows[0]} to {rows[-1]} are not finite; its file may be damaged")
        parts.append(x0.half().cpu())
        progress(len(some))
    return torch.cat(parts)


def _numbered(card: PairsCard, rows: Sequence[int]) -> Tensor:
    """Unit noise of the pairs `rows`, [B, *shape] float32."""
    return numbered_noise(card.shape, [torch.Generator("cpu").manual_seed(card.seed + row) for row in rows])
