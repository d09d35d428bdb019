"""What all commands share: the app, its consoles, and the border where users' mistakes end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

app = typer.Typer(
    name="fewstep",
    help="Turn a slow diffusion model into a 1-8 step generator.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
output = Console()


@contextmanager
def border() -> Iterator[None]:
    """Where users' mistakes end: one clear message and exit code 2, no traceback (FEWSTEP_TRACEBACK=1 shows it)."""
    try:
        yield
    except (ValueError, LookupError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("FEWSTEP_TRACEBACK"):
            raise
        fail(str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error))


def fail(message: str) -> None:
    """Print one message, on one line, and exit with code 2."""
    say(f"error: {' '.join(message.split())}")
    raise typer.Exit(2)


def say(message: str) -> None:
    """One line to the person at the keyboard (standard error; results go to standard output)."""
    console.print(message, highlight=False, markup=False, soft_wrap=True)


def load_plugins(paths: list[Path] | None) -> None:
    """Import the files named with --plugin."""
    from fewstep.registry import load_plugin

    for path in paths or ():
        load_plugin(path)


def only_given(**values: Any) -> dict[str, Any]:
    """Without the flags that were not given, which are None."""
    return {k: v for k, v in values.items() if v is not None}


def without(flags: dict[str, Any], where: str) -> None:
    """Raises ValueError that names the first flag that was given although it has no effect."""
    if names := list(only_given(**flags)):
        raise ValueError(f"--{names[0].replace('_', '-')} goes {where}")


def which_of(value: str) -> Any:
    """The checkpoint that --which names.  Raises ValueError for another word."""
    if value not in ("best", "last"):
        raise ValueError(f"--which {value!r} is not known; allowed: best, last")
    return value
