"""How far a long piece of work is: a bar on a terminal; elsewhere a line at its start and one every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fewstep.sampling import Advance

EVERY = 10.0


@contextmanager
def bar(what: str, total: int, console: Console | None = None, *, lines: bool = False) -> Iterator[Advance]:
    """Within it, call what it gives with the number of items finished since the last call.

    lines: no bar on a terminal either, where another one is on it already.
    """
    console = console or Console(stderr=True)
    if lines or not console.is_terminal:
        yield _lines(what, total, console)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)


def _lines(what: str, total: int, console: Console) -> Advance:
    began = said = time.monotonic()
    finished = 0

    def say(more: str = "") -> None:
        console.print(f"{what}: {finished}/{total}{more}", highlight=False, markup=False, soft_wrap=True)

    def advance(done: int) -> None:
        nonlocal finished, said
        finished += done
        now = time.monotonic()
        if now - said >= EVERY and finished < total:
            said = now
            say(f"  ETA {timedelta(seconds=round((now - began) / finished * (total - finished)))}")

    say()
    return advance
