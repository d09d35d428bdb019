"""The command line: parse, resolve, call one function.

This package imports neither torch nor anything that does, so that --help and wrong flags answer at once; names and
fields for `list` come from index.json, which a test compares with the registries.
"""

from __future__ import annotations

from fewstep.cli import distilling, measuring, results  # in the order of --help
from fewstep.cli.shell import app

__all__ = ["app", "distilling", "main", "measuring", "results"]


def main() -> None:
    """Entry point of the `fewstep` command."""
    app()
