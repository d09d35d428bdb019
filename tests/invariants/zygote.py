"""Runs fewstep's command line in forked processes, so that a test pays for the imports once.

One JSON request a line on stdin, one JSON answer a line on stdout:
{"argv": [...], "log": path, "fault": {...} or null, "environment": {...}} -> pid of a process that runs `fewstep ARGV`
{"wait": [pid, ...], "seconds": float} -> their exit codes, each negative if a signal killed it; [] if some had not
ended by then, and all were killed

A fault sends the process a signal at the n-th occurrence of an event: before it, after it, or half-way.
"""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch._dynamo  # noqa: F401 - every optimiser imports it, which takes longer than the rest of a run here

import fewstep.api
import fewstep.cli
from fewstep.training import checkpoint, trainer


def arm(event: str, n: int, moment: str, signum: int) -> None:
    """Put the fault into this process."""

    def step_folder(path: Any, *_: Any) -> bool:
        return Path(path).name.isdigit()

    def onto(*names: str) -> Callable[..., bool]:
        return lambda _source, target: Path(target).name in names

    def anything(*_: Any) -> bool:
        return True

    def half_file(_tensors: Any, path: Path) -> None:
        path.write_bytes(b"\x40\x00\x00\x00")

    def half_folder(path: Path) -> None:
        for file in sorted(path.iterdir())[:3]:
            file.unlink()

    places = {
        "write": (checkpoint, "save_file", anything, half_file),
        "fsync": (os, "fsync", anything, None),
        "rename": (os, "replace", lambda _source, target: step_folder(target), None),
        "config": (os, "replace", onto("config.yaml"), None),
        "rows": (os, "replace", onto("metrics.jsonl"), None),
        "prune": (shutil, "rmtree", step_folder, half_folder),
        "step": (trainer.Trainer, "step", anything, None),
        "log": (trainer.Trainer, "_log", anything, None),
    }
    owner, name, counts, half = places[event]
    original, seen = getattr(owner, name), 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += counts(*args)
        if seen != n or not counts(*args):
            return original(*args, **kwargs)
        if moment == "half":
            assert half is not None
            half(*args)
        result = original(*args, **kwargs) if moment == "after" else None
        os.kill(os.getpid(), signum)  # SIGKILL does not return; other signals let the event go on
        return original(*args, **kwargs) if moment == "before" else result

    setattr(owner, name, deadly)


def child(request: dict[str, Any]) -> int:
    """What a forked process does; returns its exit code."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request["environment"])
    if request["fault"]:
        arm(**request["fault"])
    sys.argv = ["fewstep", *request["argv"]]
    try:
        fewstep.cli.main()
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(done.code is not None)
    return 0


def wait(pids: list[int], seconds: float) -> list[int]:
    """Exit codes; [] where some processes take longer, which nobody waits for then."""
    codes, until = {}, time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < until:
        for pid in pids:
            if pid not in codes and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(ended[1])
        time.sleep(0.01)
    late = [pid for pid in pids if pid not in codes]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [] if late else [codes[pid] for pid in pids]


def answer(value: int | list[int]) -> None:
    print(json.dumps(value), flush=True)


def serve() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer(wait(request["wait"], request["seconds"]))
        elif pid := os.fork():
            answer(pid)
        else:
            code = 99
            try:
                code = child(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)


if __name__ == "__main__":
    serve()
