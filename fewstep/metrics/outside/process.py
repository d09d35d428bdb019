"""A process of another environment's Python that is asked for scores, watched, and never left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import IO

from fewstep.metrics.outside.contract import Answer, Request, read_answer

START = Path(__file__).with_name("start.py")
PROGRESS = re.compile(r"progress: (\d+)/(\d+)")
"""A line on standard error, in whatever unit the adapter counts."""
TAIL = 5
"""Last lines of standard error that an error message repeats."""
PATIENCE = 5.0
"""Seconds that are waited for the rest of standard error, once the child has ended."""
PASSED = (
    *("PATH", "HOME", "USER", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH"),
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "OMP_NUM_THREADS"),
    *("XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT"),
    *("HPS_ROOT", "VBENCH_CACHE_DIR"),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"),
)
"""Environment variables that a child inherits.  PYTHONPATH is not among them, which would show it our packages instead
of its own, nor is any token."""


@dataclass(frozen=True)
class Place:
    """Where an adapter runs: an interpreter, the script, and how its environment is made, for messages."""

    python: Path
    adapter: Path
    remedy: str = ""


def environment_of(device: str, variables: Mapping[str, str]) -> dict[str, str]:
    """The child's: those of PASSED, its output unbuffered and in UTF-8; on the CPU no GPU is to be seen."""
    passed = {name: variables[name] for name in PASSED if name in variables}
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return passed | hidden | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def check_place(place: Place) -> None:
    """Raises FileNotFoundError or ValueError unless the interpreter and the adapter are there."""
    if not place.adapter.is_file():
        raise FileNotFoundError(f"no adapter at {place.adapter}")
    if not place.python.is_file():
        raise FileNotFoundError(f"no Python at {place.python}; --python is an environment's bin/python. {place.remedy}")
    if not os.access(place.python, os.X_OK):
        raise ValueError(f"{place.python} cannot be executed; --python is an environment's bin/python")


def ask(place: Place, request: Request, *, timeout: float, advance: Callable[[int], None] | None = None) -> Answer:
    """Run the adapter, and return its answer once all of it was checked.

    timeout: seconds.  advance: told the number of items done since the last call, from another thread.
    Raises what `check_place` does; TimeoutError; ChildProcessError if it exits with another code than 0; ValueError for
    a bad answer.  No shell and no pickle; the child and all that it started end when this returns or this process dies.
    """
    check_place(place)
    name, last = request.metric, deque[str](maxlen=TAIL)

    def said() -> str:
        return f"Its last lines: {' | '.join(last)}. " if last else ""

    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as answered:
        asked.write(request.to_json().encode("utf-8"))
        asked.seek(0)
        try:
            code = _run(place, request, asked, answered, timeout, last, advance)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"{name} gave no answer within {timeout:g} s (--timeout). {said()}") from error
        if code != 0:
            ended = f"was killed by signal {-code}" if code < 0 else f"exited with code {code}"
            raise ChildProcessError(f"{name} in {place.python} {ended}. {said()}{place.remedy}")
        answered.seek(0)
        try:
            return read_answer(answered.read().decode("utf-8", errors="replace"), request)
        except ValueError as error:
            raise ValueError(f"{name}: {error}. The adapter is {place.adapter}") from error


def _run(
    place: Place,
    request: Request,
    asked: IO[bytes],
    answered: IO[bytes],
    timeout: float,
    last: deque[str],
    advance: Callable[[int], None] | None,
) -> int:
    """The exit code.  Raises subprocess.TimeoutExpired."""
    life, ours = os.pipe()
    try:
        child = subprocess.Popen(
            [str(place.python), str(START), str(life), str(place.adapter.resolve())],
            stdin=asked,
            stdout=answered,
            stderr=subprocess.PIPE,
            env=environment_of(request.device, os.environ),
            pass_fds=(life,),
            start_new_session=True,  # a group of its own, which can be killed whole
            text=True,
            encoding="utf-8",
            errors="replace",
        )
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(life)
    assert child.stderr is not None
    over = Event()
    reader = Thread(target=_listen, args=(child.stderr, last, len(request.items), advance, over), daemon=True)
    reader.start()
    try:
        return child.wait(timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        os.close(ours)
        child.wait()
        reader.join(PATIENCE)  # what has left the group may hold standard error open
        over.set()


def _listen(lines: IO[str], last: deque[str], total: int, advance: Callable[[int], None] | None, over: Event) -> None:
    """Keep the last lines; of `progress: N/M` tell the share in items, until it is over.  Closes what it reads: from
    another thread that would wait for the line being read.
    """
    done = 0
    with lines:
        for line in lines:
            line = line.strip()
            found = PROGRESS.fullmatch(line)
            if found is None:
                last.extend([line] if line else [])
            elif advance is not None and int(found[2]) and not over.is_set():
                now = min(total, total * int(found[1]) // int(found[2]))
                if now > done:
                    advance(now - done)
                    done = now
