"""The README's examples run as they stand.

A fenced block after the HTML comment `<!-- test -->` is executed, all of them in order and in one temporary folder;
one after `<!-- test: slow -->` only in the slow suite.  In bash blocks `fewstep` is this source tree's.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
MARKED = re.compile(r"^<!-- test(?P<slow>: slow)? -->\n+```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
FEWSTEP = f'set -euo pipefail\nfewstep() {{ "{sys.executable}" -m fewstep.cli "$@"; }}\n'


class Block(NamedTuple):
    language: str
    code: str
    slow: bool


def marked_blocks(text: str) -> list[Block]:
    return [Block(m["language"], m["code"], bool(m["slow"])) for m in MARKED.finditer(text)]


def check_runs(block: Block, folder: Path) -> None:
    command = {"bash": ["bash", "-c", FEWSTEP + block.code], "python": [sys.executable, "-c", block.code]}
    assert block.language in command, f"a marked block must be bash or python, not {block.language}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command[block.language], cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, f"{block.code}\n{done.stdout}\n{done.stderr}"


@pytest.fixture
def blocks() -> list[Block]:
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    return marked_blocks(README.read_text(encoding="utf-8"))


def test_every_mark_is_followed_by_a_block_that_is_found(blocks):
    """Fails if a mark is misspelt, or a block is not fenced right after it."""
    assert len(blocks) == README.read_text(encoding="utf-8").count("<!-- test") >= 1
    assert any(not block.slow for block in blocks)


def test_marked_examples_run(blocks, tmp_path):
    for block in blocks:
        if not block.slow:
            check_runs(block, tmp_path)


@pytest.mark.slow
def test_slow_examples_run_after_the_others(blocks, tmp_path):
    for block in blocks if any(block.slow for block in blocks) else []:
        check_runs(block, tmp_path)


def test_failing_example_fails_the_test(tmp_path):
    """Fails if a bash block goes on after a command that failed."""
    with pytest.raises(AssertionError, match="no run at nowhere"):
        check_runs(Block("bash", "fewstep sample nowhere\ntrue\n", False), tmp_path)


def test_unmarked_blocks_are_left_alone():
    text = "```bash\nfalse\n```\n<!-- test: slow -->\n```bash\na\n```\n<!-- test -->\n\n```python\nb\n```\n"
    assert marked_blocks(text) == [Block("bash", "a\n", True), Block("python", "b\n", False)]
