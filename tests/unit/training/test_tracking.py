import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fewstep.training import tracking
from fewstep.training.tracking import Tracker


def tracker(out: Path, *, start: int = 0, terminal: bool = False, **more) -> tuple[Tracker, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, width=200, force_terminal=terminal)
    return Tracker(out, total=40, start=start, console=console, **more), screen


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_rows_after_the_resumed_iteration_are_dropped(tmp_path: Path):
    """The row of the resumed iteration stays: its checkpoint was written after it.  Fails with `<` for `<=`."""
    first, _ = tracker(tmp_path)
    for iteration in (10, 20, 20, 30):
        first.log(iteration, {"dm": 0.5})
    tracker(tmp_path, start=20)
    assert [row["iteration"] for row in rows(tmp_path)] == [10, 20, 20]


def test_half_written_last_line_is_dropped(tmp_path: Path):
    """Fails without the except: a run killed while it logged could never be resumed."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"iteration": 10, "dm": NaN}\n{"iteration": 2')
    resumed, _ = tracker(tmp_path, start=20)
    resumed.log(30, {"dm": 1.0})
    assert [row["iteration"] for row in rows(tmp_path)] == [10, 30]


def test_only_the_main_process_drops_rows(tmp_path: Path):
    """Two would take each other's temporary file away."""
    tracker(tmp_path)[0].log(30, {})
    tracker(tmp_path, start=20, main=False)
    assert len(rows(tmp_path)) == 1


def test_plain_line_has_speed_and_remaining_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """10 of 40 iterations of 16 images took 4 s: 40 images/s, 12 s to go."""
    now = 100.0
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    made, screen = tracker(tmp_path)
    now = 104.0
    with made:
        made.log(10, {"dm": 0.123456, "critic": 2.0, "other": 3.0}, images=160)
    assert screen.getvalue() == "iteration 10/40  ETA 0:12  40 images/s  dm 0.1235  critic 2\n"


def test_speed_of_a_resumed_run_counts_only_its_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Iterations 20 to 30 took 4 s.  Fails with iteration / elapsed: three times as fast as it is."""
    now = 100.0
    monkeypatch.setattr(tracking.time, "monotonic", lambda: now)
    made, screen = tracker(tmp_path, start=20, seconds=50.0)
    now = 104.0
    made.log(30, {}, images=480)
    assert "ETA 0:04  40 images/s" in screen.getvalue()
    assert rows(tmp_path)[0]["seconds"] == 54.0


def test_rows_without_images_are_only_written(tmp_path: Path):
    made, screen = tracker(tmp_path)
    made.log(20, {"eval/fd@1000": 1.5})
    assert screen.getvalue() == "" and rows(tmp_path)[0]["eval/fd@1000"] == 1.5


def test_terminal_gets_a_bar_and_no_plain_lines(tmp_path: Path):
    made, screen = tracker(tmp_path, terminal=True)
    with made:
        made.advance(10)
        made.log(10, {"dm": 0.5}, images=160)
    assert "10/40" in screen.getvalue() and "ETA" in screen.getvalue() and "images/s" in screen.getvalue()
    assert "iteration 10/40" not in screen.getvalue()


def test_messages_are_printed_as_they_are(tmp_path: Path):
    """Brackets are no markup, long lines are not broken."""
    made, screen = tracker(tmp_path)
    made.say("x" * 300 + " [bold] 3")
    assert screen.getvalue() == "x" * 300 + " [bold] 3\n"


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str):
    assert tracking._clock(seconds) == text


def test_tensorboard_gets_the_same_figures_and_hides_what_a_kill_left(tmp_path: Path):
    """Fails without purge_step: the rows after the checkpoint would be drawn twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, iterations in ((0, (10, 20, 30)), (20, (30, 40))):
        made, _ = tracker(tmp_path, start=start, tensorboard=True)
        with made:
            for iteration in iterations:
                made.log(iteration, {"dm": iteration + start / 100})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    seen = [(event.step, round(event.value, 3)) for event in board.Scalars("dm")]
    assert seen == [(10, 10.0), (20, 20.0), (30, 30.2), (40, 40.2)]
    assert [row["dm"] for row in rows(tmp_path)] == [10.0, 20.0, 30.2, 40.2]
