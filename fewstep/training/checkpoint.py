"""Checkpoints that survive a kill at any moment and a damaged byte.

A checkpoint is a folder of safetensors and JSON.  It is written beside its final place, flushed to the disk, and
renamed: readers see all of it or none.  A manifest of SHA-256 sums is its last file; a folder without one, or with a
byte that differs, is not a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep.files import flush
from fewstep.models.sharding import spread, whole

log = logging.getLogger("fewstep")

MANIFEST = "manifest.json"
STATE = "state.json"

CONFIG = "config.yaml"
PROMPTS = "prompts.txt"
"""Beside the checkpoints in a run's folder: its settings, and a copy of the prompts it was given."""


@dataclass(frozen=True)
class Checkpoint:
    """tensors: file stem -> name -> tensor.  state: everything that is not a tensor, as JSON holds it."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint folder atomically; an existing one of that name is replaced.  Returns `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".writing-{folder.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    for stem, tensors in checkpoint.tensors.items():
        save_file(_apart(tensors), temporary / f"{stem}.safetensors")
    (temporary / STATE).write_text(json.dumps(checkpoint.state, indent=1, sort_keys=True))
    sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps(sums, indent=1, sort_keys=True))
    for path in temporary.iterdir():
        flush(path)
    flush(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)
    flush(folder.parent)
    return folder


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write one safetensors file atomically, making its folder; two processes that write the same one do no harm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    held = None if metadata is None else dict(metadata)
    save_file({k: v.detach().contiguous().cpu() for k, v in tensors.items()}, temporary, held)
    flush(temporary)
    os.replace(temporary, path)


def fingerprint(network: nn.Module) -> str:
    """Tells weights apart by at most 256 values of each tensor: enough for any training or re-saving, and cheap.

    Every process must ask for that of a sharded network.
    """
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        some = whole(value).detach().flatten()[:: max(1, value.numel() // 256)].cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read(folder: Path, *, only: str | None = None) -> Checkpoint:
    """Read a checkpoint whose every byte is as written.  Raises ValueError that says what is damaged.

    only: the stem of the one file of tensors that is wanted; the others are neither checked nor read.
    """
    problem = damage(folder, only=only)
    if problem:
        raise ValueError(f"checkpoint {folder} is damaged: {problem}")
    files = folder.glob("*.safetensors" if only is None else f"{only}.safetensors")
    return Checkpoint({path.stem: load_file(path) for path in files}, json.loads((folder / STATE).read_text()))


def damage(folder: Path, *, only: str | None = None) -> str | None:
    """What is wrong with a checkpoint folder, or None.  only: as in `read`."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (UnicodeDecodeError, json.JSONDecodeError):
        return f"{MANIFEST} does not parse"
    for name, expected in sums.items():
        path = folder / name
        if only is not None and name not in (STATE, f"{only}.safetensors"):
            continue
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != expected:
            return f"{name} differs from what was written"
    return None


def all_of(run: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, whether valid or not."""
    root = run / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(
        (p for p in root.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name), reverse=True
    )


def newest_valid(run: Path, *, only: str | None = None) -> Path | None:
    """The newest undamaged checkpoint; each damaged one passed over is reported.  None if there is none.

    only: as in `read`.
    """
    for folder in all_of(run):
        problem = damage(folder, only=only)
        if problem is None:
            return folder
        log.error("checkpoint %s is DAMAGED (%s); falling back to the one before", folder, problem)
    return None


def folder_of(run: Path, iteration: int) -> Path:
    """Where the checkpoint after `iteration` iterations lies."""
    return run / "checkpoints" / f"{iteration:08d}"


def prune(run: Path, keep: int, best: int | None, *, written: Path | None = None) -> None:
    """Delete all but the newest `keep` valid checkpoints and the best one; leftovers of killed writes go too.

    written: the one written just now, which is not read again to see whether it is valid.
    """
    kept = 0
    for folder in all_of(run):
        if kept < keep and (folder == written or damage(folder) is None):
            kept += 1
        elif int(folder.name) != best:
            shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(".writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def pack_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as named tensors ("<parameter index>.<name>", names may be nested) and JSON."""
    state = optimizer.state_dict()
    flat = {f"{i}.{name}": value for i, entry in state["state"].items() for name, value in _leaves(entry)}
    tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
    rest = {name: value for name, value in flat.items() if name not in tensors}  # bitsandbytes counts steps in an int
    return tensors, {"param_groups": state["param_groups"], "rest": rest}


def unpack_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], extra: Mapping[str, Any]) -> None:
    """Put a packed state back.  Raises ValueError (from torch) if the parameter groups differ."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, Any] = {}
    mine = {name: spread(value, parameters[int(name.partition(".")[0])]) for name, value in tensors.items()}
    for name, value in {**mine, **extra.get("rest", {})}.items():
        index, *outer, last = name.split(".")
        entry = state.setdefault(int(index), {})
        for part in outer:
            entry = entry.setdefault(part, {})
        entry[last] = value
    optimizer.load_state_dict({"state": state, "param_groups": extra["param_groups"]})


def _leaves(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names, joined by dots, and values of nested mappings."""
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}.{inner}", leaf) for inner, leaf in _leaves(value))
        else:
            yield name, value


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each in memory of its own, without which safetensors refuses them."""
    made: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().contiguous().cpu()
        made[name] = value.clone() if value.data_ptr() in places else value
        places.add(value.data_ptr())
    return made


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
