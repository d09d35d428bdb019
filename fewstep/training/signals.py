"""SIGINT and SIGTERM as a request to stop after the present iteration."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; only the main thread may set handlers."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    wanted = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(s, lambda signum, _frame: caught.append(signum)) for s in wanted]
    try:
        yield caught
    finally:
        for s, handler in zip(wanted, before, strict=True):
            signal.signal(s, handler)
