"""SIGINT and SIGTERM as a request to stop after the present iteration."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

STOPPING = b"\nstopping after this iteration; saving\n"


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; only the main thread may set handlers.

    The first is answered at once on standard error: an iteration, and the evaluation after it, may take a while.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(signum: int, _frame: Any) -> None:
        if not caught:
            # Not by sys.stderr: a handler may interrupt a write to it, and a second one within is an error.
            with suppress(OSError):
                os.write(2, STOPPING)
        caught.append(signum)

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, catch) for s in wanted]
    try:
        yield caught
    finally:
        for s, handler in zip(wanted, before, strict=True):
            signal.signal(s, handler)
