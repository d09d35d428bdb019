import io

from rich.console import Console

from fewstep import bar as module
from fewstep.bar import bar


def said(*, terminal: bool = False, **options) -> str:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=terminal)
    with bar("drawing", 40, console, **options) as done:
        for _ in range(4):
            done(10)
    return file.getvalue()


def test_a_log_gets_a_line_at_the_start_and_none_for_what_is_soon_done():
    assert said() == "drawing: 0/40\n"


def test_a_log_gets_remaining_time_of_what_takes_long(monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.0)
    lines = said().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"drawing: {n}/40" for n in (0, 10, 20, 30)]
    assert all("ETA 0:00:0" in line for line in lines[1:])


def test_a_terminal_gets_a_bar_unless_lines_are_wanted():
    assert "40/40" in said(terminal=True) and "\x1b" in said(terminal=True)
    assert said(terminal=True, lines=True).strip() == "drawing: 0/40"
