"""Blocks of code in README.md and docs/: which are run, and how."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MARK = r"<!-- (?:(?P<test>test)(?P<slow>: slow)?|not run: (?P<reason>[^\n]*\S)) -->\n+"
FENCE = r"```(?P<language>\w+)\n(?P<code>.*?)^```$"
MARKED, FENCED = re.compile(f"^{MARK}{FENCE}", re.M | re.S), re.compile(f"^(?:{MARK})?{FENCE}", re.M | re.S)
HERE = f'"{sys.executable}"'
SHELL = f'set -euo pipefail\nfewstep() {{ {HERE} -m fewstep.cli "$@"; }}\npython() {{ {HERE} "$@"; }}\n'


class Block(NamedTuple):
    """Code, and whether it is run in the slow suite alone."""

    language: str
    code: str
    slow: bool


def marked_blocks(text: str) -> list[Block]:
    """The blocks that are run, in order."""
    return [Block(m["language"], m["code"], bool(m["slow"])) for m in MARKED.finditer(text) if m["test"]]


def unmarked(text: str) -> list[str]:
    """The first lines of blocks that say neither that they are run nor why not; plain text is no code."""
    found = (m for m in FENCED.finditer(text) if m["language"] != "text" and not (m["test"] or m["reason"]))
    return [m["code"].split("\n")[0] for m in found]


def check_runs(block: Block, folder: Path) -> None:
    """Run it in this folder.  Raises AssertionError, with what it printed, if it fails."""
    command = {"bash": ["bash", "-c", SHELL + block.code], "python": [sys.executable, "-c", block.code]}
    assert block.language in command, f"a marked block must be bash or python, not {block.language}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command[block.language], cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"
