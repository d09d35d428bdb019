"""A plan as a table for people and as figures for programs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

from rich.console import Group
from rich.table import Column, Table

from fewstep.config import RunConfig
from fewstep.planning.fit import first_fit, fits, verdict
from fewstep.planning.ledger import CATEGORIES
from fewstep.planning.plan import GIB, SHARDED, Plan, plan

OFF = "VAE and text encoders are off the GPU while training; a preview decodes a few pictures at a time on top."


def answer(
    config: RunConfig,
    gpus: int,
    sharded: bool,
    gpu_memory: float | None,
    *,
    as_json: bool,
    say: Callable[[str], None],
) -> tuple[Any, bool]:
    """What `fewstep plan` prints, and whether it fits, if a GPU's memory (GiB) is given.

    If it does not, it is planned anew with each remedy until one makes it fit.  say: told of those.
    """
    if gpu_memory is not None and not 0 < gpu_memory < float("inf"):
        raise ValueError(f"--gpu-memory {gpu_memory}: give the GiB of one GPU, as 24 or 80")
    started = time.perf_counter()
    made = plan(config, gpus=gpus, sharded=sharded)
    fit, way, lines = gpu_memory is None or fits(made, gpu_memory), None, [verdict(made, gpu_memory)]
    if gpu_memory is not None and not fit:
        way = first_fit(made, gpu_memory, say)
        if way is None:
            lines.append("no remedy makes it fit; take a GPU with more memory, or several with --fsdp")
        else:
            lines.append(f"with {' '.join(way[0].flags)} it {verdict(way[1], gpu_memory)}")
    if as_json:
        figures = figures_of(made) | {"fits": fit if gpu_memory is not None else None}
        figures["remedy"] = {"flags": way[0].flags, **figures_of(way[1])} if way is not None else None
        return json.dumps(figures), fit
    lines.append(f"planned in {time.perf_counter() - started:.0f} s")
    return Group(table_of(made), *lines), fit


def table_of(made: Plan) -> Group:
    """Peak memory of each turn by category, parameters, calls and FLOPs."""
    config, train = made.config, made.config.train
    unit, size = ("GiB", GIB) if made.peak >= GIB else ("MiB", 2**20)
    table = Table(f"at the peak, {unit}", *(Column(f"{turn}'s turn", justify="right") for turn in made.parts))
    held = [made.bytes(turn) for turn in made.parts]
    for kind in CATEGORIES:
        if made.sharded or kind != "gathered":
            table.add_row(kind, *(f"{bytes[kind] / size:,.2f}" for bytes in held))
    table.add_row("all", *(f"{sum(bytes.values()) / size:,.2f}" for bytes in held), end_section=True)
    table.add_row("activations, at their most", *(f"{p.peak.activations / size:,.2f}" for p in made.parts.values()))
    roles = sorted({role for part in made.parts.values() for role in part.calls})
    for role in roles:
        table.add_row(f"calls of the {role}", *(str(part.calls.get(role, 0)) for part in made.parts.values()))
    table.add_row("TFLOPs of an update", *(f"{part.flops / 1e12:,.3g}" for part in made.parts.values()))
    table.add_row("updates per iteration", *(f"{part.share:.2g}" for part in made.parts.values()))
    trained = ", ".join(f"{role} {count / 1e6:,.1f}M" for role, count in made.trained.items())
    checkpointing = ", gradient checkpointing" if train.gradient_checkpointing else ""
    offload = ", the teacher offloaded" if train.offload_teacher else ""
    lines = [
        f"{config.teacher} by {config.method} at {'x'.join(map(str, made.size))}: {train.sharing}, "
        f"{train.precision}{checkpointing}{offload}; {made.micro_batch} samples at a time, {train.accumulate} times, "
        f"on {made.gpus} GPU{'s' * (made.gpus > 1)}",
        f"parameters: teacher {made.parameters['teacher'] / 1e6:,.1f}M; trained: {trained}",
        f"a mean iteration: {made.flops / 1e12:,.3g} TFLOPs on each GPU; rollouts are taken to their last step",
        OFF,
    ]
    if made.sharded:
        lines.append(
            f"FSDP2: {', '.join(SHARDED)} divided by {made.gpus}; gathered: the largest block whole, the next one, and "
            "its gradient. The loaded teacher stays in each process's host memory."
        )
    return Group(lines[0], lines[1], table, *lines[2:])


def figures_of(made: Plan) -> dict[str, Any]:
    """All of a plan: bytes, FLOPs, numbers of parameters."""
    return {
        "teacher": made.config.teacher,
        "method": made.config.method,
        "sharing": made.config.train.sharing,
        "precision": made.config.train.precision,
        "gradient_checkpointing": made.config.train.gradient_checkpointing,
        "size": made.size,
        "micro_batch": made.micro_batch,
        "accumulate": made.config.train.accumulate,
        "gpus": made.gpus,
        "fsdp": made.sharded,
        "parameters": made.parameters,
        "trained": made.trained,
        "turns": {
            turn: {
                "bytes": made.bytes(turn),
                "activations_at_most": part.peak.activations,
                "peak": sum(made.bytes(turn).values()),
                "calls": part.calls,
                "flops": part.flops,
                "share": part.share,
            }
            for turn, part in made.parts.items()
        },
        "peak": made.peak,
        "flops_per_iteration": made.flops,
        "needed_gib": made.needed,
    }
