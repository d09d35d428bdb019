"""One training loop for every stage: a wall clock budget, AdamW, EMA of the weights, and exact restart points."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Plan:
    """What a stage's training costs and how fast it moves.

    The budget is `steps`, or where that is None `minutes`: time spent in steps, over all restarts. The learning rate
    follows the share of the budget that is used, so under a time budget a slow or crowded machine makes fewer steps but
    still ends its schedule.  peak_lr: after warm-up (share of the budget).
    ema: decay of the averaged weights per step.  save_every: seconds between restart points.  shards: a step's gradient
    is the mean over so many calls of the loss; with more than one, single-threaded workers share the calls. On a
    crowded machine that is much faster than threads inside each operation, which wait for one another after every one
    (measured: 332 against 213 images per second, two cores shared with other work).
    """

    name: str
    minutes: float
    peak_lr: float
    steps: int | None = None
    warmup: float = 0.05
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    ema: float = 0.999
    seed: int = 0
    shards: int = 1
    save_every: float = 60.0

    def progress(self, iteration: int, seconds: float) -> float:
        """Share of the budget that is used; training ends at 1."""
        return iteration / self.steps if self.steps else seconds / (60 * self.minutes)

    def lr(self, progress: float) -> float:
        """Learning rate at a share of the budget in [0, 1]: linear warm-up, then half a cosine down to zero."""
        if progress < self.warmup:
            return self.peak_lr * max(progress / self.warmup, 0.02)
        return self.peak_lr * 0.5 * (1 + math.cos(math.pi * min((progress - self.warmup) / (1 - self.warmup), 1.0)))


def write_json(path: Path, content: dict) -> None:
    """Write JSON so that a reader sees the old file or the whole new one: temporary file, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        json.dump(content, handle, indent=1)
        handle.write("\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors under a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary)
    temporary.chmod(0o644)  # safetensors makes it readable for its owner alone
    temporary.replace(path)


def read_json(path: Path) -> dict:
    """The content of a JSON file that holds an object."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_notes(out: Path, teacher: str = "fashion-dit") -> dict[str, dict]:
    """What each finished stage of a pipeline folder has noted about itself (build.json); empty before the first."""
    path = out / teacher / "build.json"
    return read_json(path) if path.is_file() else {}


def write_note(out: Path, work: Path, plan: Plan, figures: dict, teacher: str = "fashion-dit") -> None:
    """Note a stage as finished, with its figures, training steps and seconds. The note lies beside the weights, so a
    stage counts as finished wherever its artefact is."""
    spent = read_json(work / f"{plan.name}.json")
    note = {"steps": spent["iteration"], "seconds": round(spent["seconds"], 1), "peak_lr": plan.peak_lr} | figures
    write_json(out / teacher / "build.json", read_notes(out, teacher) | {plan.name: note})
    log.info("%s: %s", plan.name, note)


def _pack(model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that a restart needs, as flat names."""
    tensors = {f"model/{name}": value.clone() for name, value in model.state_dict().items()}
    tensors |= {f"ema/{name}": value.clone() for name, value in averaged.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"adam/{index}/{slot}": value.clone() for slot, value in slots.items()}
    return tensors


def _unpack(
    tensors: dict[str, Tensor], model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Put the tensors of `_pack` back in place."""
    for prefix, module in (("model/", model), ("ema/", averaged)):
        module.load_state_dict({n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)})
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("adam/"):
            _, index, slot = name.split("/")
            p = parameters[int(index)]
            # In the parameter's memory layout: fused AdamW on the CPU mixes up elements where moments have another.
            state.setdefault(int(index), {})[slot] = torch.empty_like(p).copy_(value) if value.ndim else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


@torch.no_grad()
def average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    """averaged <- decay averaged + (1 - decay) model, parameters and float buffers; integer buffers are copied."""
    ours, theirs = list(averaged.state_dict().values()), list(model.state_dict().values())
    floats = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - decay)
    for a, b in zip(ours, theirs, strict=True):
        if not a.is_floating_point():
            a.copy_(b)


def train(
    plan: Plan,
    model: Network,
    loss_of: Callable[[Network, torch.Generator], Tensor],
    folder: Path,
    *,
    on_save: Callable[[Network, float], None] | None = None,
) -> Network:
    """Train for the plan's minutes, going on from the last restart point; returns the averaged model in eval mode.

    loss_of(model, generator) draws one batch with the generator, which is seeded by (plan.seed, iteration), and returns
    a scalar.  on_save(averaged model, minutes used) is called after every restart point.
    """
    averaged = copy.deepcopy(model).requires_grad_(False)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": plan.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=plan.peak_lr, betas=plan.betas, fused=True)
    iteration, used = _resume(plan, folder, model, averaged, optimizer)
    model.train()
    pool = ThreadPoolExecutor(torch.get_num_threads())
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if plan.shards > 1 else threads)
    total, seen, saved = torch.zeros(()), 0, used
    while (progress := plan.progress(iteration, used)) < 1:
        start = time.monotonic()
        for group in optimizer.param_groups:
            group["lr"] = plan.lr(progress)
        loss = step_gradient(plan, model, loss_of, iteration, pool)
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.clip)
        optimizer.step()
        average(averaged, model, min(plan.ema, (1 + iteration) / (10 + iteration)))
        iteration, seen, total = iteration + 1, seen + 1, total + loss
        used += time.monotonic() - start
        if used - saved >= plan.save_every or plan.progress(iteration, used) >= 1:
            log.info("%s: %.1f min, step %d, loss %.4f", plan.name, used / 60, iteration, float(total) / seen)
            write_tensors(folder / f"{plan.name}.safetensors", _pack(model, averaged, optimizer))
            write_json(
                folder / f"{plan.name}.json", {"iteration": iteration, "seconds": used, "loss": float(total) / seen}
            )
            total, seen, saved = torch.zeros(()), 0, used
            if on_save is not None:
                on_save(averaged, used / 60)
    pool.shutdown()
    torch.set_num_threads(threads)
    return averaged.eval()


def step_gradient(
    plan: Plan,
    model: Network,
    loss_of: Callable[[Network, torch.Generator], Tensor],
    iteration: int,
    pool: ThreadPoolExecutor,
) -> Tensor:
    """Put the mean gradient over the plan's shards into the parameters' .grad; returns the mean loss, detached.

    Shard s draws from a generator seeded by (plan.seed, iteration, s) and the sum runs in the order of s, so the result
    does not depend on which worker was faster.
    """
    parameters = list(model.parameters())

    def gradient(shard: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        seed = (plan.seed * 1_000_003 + iteration) * 64 + shard
        loss = loss_of(model, torch.Generator().manual_seed(seed))
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    shards = range(plan.shards)
    results = [gradient(0)] if plan.shards == 1 else list(pool.map(gradient, shards))
    for parameter, *parts in zip(parameters, *(grads for _, grads in results), strict=True):
        present = [part for part in parts if part is not None]
        parameter.grad = sum(present[1:], present[0]) / plan.shards if present else None
    return torch.stack([loss for loss, _ in results]).mean()


def _resume(plan: Plan, folder: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer) -> tuple:
    """Iteration and seconds of the last restart point, whose tensors are put in place; (0, 0.0) if there is none."""
    note = folder / f"{plan.name}.json"
    if not note.is_file():
        return 0, 0.0
    stored = read_json(note)
    _unpack(load_file(folder / f"{plan.name}.safetensors"), model, averaged, optimizer)
    log.info("%s: going on from step %d", plan.name, stored["iteration"])
    return stored["iteration"], stored["seconds"]
