"""What a run says while it goes: metrics.jsonl always, a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fewstep.advice import advice
from fewstep.files import write_text


class Tracker:
    """Appends rows to <out>/metrics.jsonl and shows progress.

    Rows after the resumed iteration are dropped first, by the main process, so that a resumed run's file is that of an
    unbroken one.  tensorboard: write the figures for TensorBoard too, into <out>/tensorboard.
    boards: trackers of accelerate's that hear of them as well, see `boards`.
    """

    def __init__(
        self,
        out: Path,
        *,
        total: int,
        start: int,
        console: Console,
        seconds: float = 0.0,
        main: bool = True,
        tensorboard: bool = False,
        boards: Sequence[Any] = (),
    ) -> None:
        self.path = out / "metrics.jsonl"
        self._console = console
        self._total = total
        self._start = start
        self._began = time.monotonic()
        self._earlier = seconds
        self._progress: Progress | None = None
        self._board: Any = None
        self._boards = boards
        self._advised: set[str] = set()
        if main:
            self._truncate(start)
        if main and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step: what a killed run wrote after the checkpoint is hidden, as metrics.jsonl drops it.
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    @property
    def seconds(self) -> float:
        """Wall seconds of training so far, earlier parts of a resumed run included."""
        return self._earlier + time.monotonic() - self._began

    def __enter__(self) -> Tracker:
        if self._console.is_terminal:
            progress = Progress(
                TextColumn("[bold]distil"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            progress.start()
            self._task = progress.add_task("distil", total=self._total, completed=self._start, note="")
            self._progress = progress
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        for board in self._boards:
            board.finish()

    def advance(self, iteration: int) -> None:
        """`iteration` iterations are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=iteration)

    def log(self, iteration: int, row: Mapping[str, float | int], *, images: int | None = None) -> None:
        """Write one row of figures; with `images` (seen so far) also show speed and remaining time."""
        record = {"iteration": iteration, "seconds": round(self.seconds, 3), **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, iteration)
        for board in self._boards:
            board.log(dict(row), step=iteration)
        if images is not None:
            self._show(iteration, row, images)

    def advise(self, train: Mapping[str, Any]) -> None:
        """Say what the figures so far mean, each kind of thing once.  train: the settings of training."""
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        for name, sentence in advice(rows, train).items():
            if name not in self._advised:
                self.say(f"advice: {sentence}")
                self._advised.add(name)

    def say(self, message: str) -> None:
        """One line for the person at the keyboard."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def _show(self, iteration: int, row: Mapping[str, float | int], images: int) -> None:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = (iteration - self._start) / elapsed
        speed = images / max(iteration, 1) * rate
        losses = "  ".join(f"{k} {row[k]:.4g}" for k in ("dm", "critic", "gan", "x/std") if k in row)
        note = f"{speed:.0f} images/s  {losses}"
        if self._progress is not None:
            self._progress.update(self._task, note=note)
        else:
            left = (self._total - iteration) / max(rate, 1e-9)
            self.say(f"iteration {iteration}/{self._total}  ETA {_clock(left)}  {note}")

    def _truncate(self, start: int) -> None:
        """Keep only whole rows of iterations <= start."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["iteration"] <= start:
                    kept.append(line)
            except json.JSONDecodeError:
                continue  # the line that a kill cut short
        write_text(self.path, "".join(line + "\n" for line in kept))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
