"""One operator at one shape, and how its contenders are timed against each other and against copying memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fewstep_cuda import dispatch

Call = Callable[[], object]
REPEATS, TURN = 8, 0.1
"""Timed calls of a contender in a row, after one that is not: others' data have just been through the caches.  Those of
slow contenders, for which that matters little, are fewer: about so many seconds, one call at least."""
COPY = "copy"


def kernels(operator: str, device: str) -> list[str]:
    """Backends of an operator that are compiled for this device."""
    return [name for name in dispatch.KERNELS[operator] if dispatch.DEVICES.get(name) == device]


def draw(shape: tuple[int, ...], count: int, device: str) -> list[torch.Tensor]:
    """So many tensors of normal numbers, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, generator=generator, device=device) for _ in range(count)]


@dataclass(frozen=True)
class Case:
    """An operator at a shape.

    moved: bytes that must cross memory at least, each input read and each output written once.  device: cpu or cuda,
    where the inputs are.  contenders: name -> a function that prepares a call and returns it; a ValueError,
    RuntimeError or OSError from it, or from the first call, which may compile, skips the contender and is told.
    """

    operator: str
    name: str
    shape: tuple[int, ...]
    moved: int
    device: str
    contenders: Mapping[str, Callable[[], Call]]


@dataclass(frozen=True)
class Timing:
    """Of one contender, in seconds; or why there is none."""

    contender: str
    best: float = 0.0
    median: float = 0.0
    n: int = 0
    skipped: str = ""


def measure(case: Case, seconds: float) -> list[Timing]:
    """Call the contenders, and a copy of as many bytes, in turns until so many seconds have passed for each."""
    ready, skipped, turns = {COPY: _copy(case.moved, case.device)}, [], {COPY: REPEATS}
    for name, prepare in case.contenders.items():
        try:
            call = prepare()
            call()  # compiles
            turns[name] = min(REPEATS, max(1, int(TURN / _timed(call, 1, case.device)[0])))
        except (ValueError, RuntimeError, OSError) as error:
            skipped.append(Timing(name, skipped=str(error).strip().splitlines()[0][:200]))
        else:
            ready[name] = call
    times: dict[str, list[float]] = {name: [] for name in ready}
    end = time.perf_counter() + seconds * len(ready)
    while time.perf_counter() < end:
        for name, call in ready.items():
            if turns[name] == REPEATS:
                call()
            times[name] += _timed(call, turns[name], case.device)
    timed = [Timing(name, min(found), sorted(found)[len(found) // 2], len(found)) for name, found in times.items()]
    return timed + skipped


def _timed(call: Call, count: int, device: str) -> list[float]:
    """Seconds of so many calls in a row; on a GPU their mean, as calls overlap with launching the next."""
    if device == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return [start.elapsed_time(end) / 1e3 / count]
    times = []
    for _ in range(count):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times


def row(case: Case, timing: Timing, copy: Timing) -> dict[str, Any]:
    """What is kept of a timing.  of_copy: its bandwidth by the copy's, best by best."""
    told: dict[str, Any] = {"operator": case.operator, "case": case.name, "shape": list(case.shape)}
    told |= {"contender": timing.contender, "bytes": case.moved}
    if timing.skipped:
        return told | {"skipped": timing.skipped}
    told |= {"best_us": round(1e6 * timing.best, 1), "median_us": round(1e6 * timing.median, 1), "n": timing.n}
    return told | {"gb_per_s": round(case.moved / timing.best / 1e9, 1), "of_copy": round(copy.best / timing.best, 3)}


def _copy(moved: int, device: str) -> Call:
    """Half of the bytes are read, half written."""
    source = torch.ones(moved // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
