"""The examples of README.md and docs/ run as they stand.

A fenced block after the HTML comment `<!-- test -->` is executed, all of a document in order and in one temporary
folder; one after `<!-- test: slow -->` only in the slow suite.  In bash blocks `fewstep` is this source tree's.  In
docs/ each other block, but for plain text, has its reason above it: `<!-- not run: REASON -->`.
"""

import pytest

from tests.documents import PAGES, README, ROOT, Block, check_runs, marked_blocks, unmarked

DOCUMENTS = [README, *PAGES]


def named(paths):
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def blocks_of(path):
    return marked_blocks(path.read_text(encoding="utf-8"))


FAST = [path for path in DOCUMENTS if any(not block.slow for block in blocks_of(path))]
SLOW = [path for path in DOCUMENTS if any(block.slow for block in blocks_of(path))]


@pytest.mark.parametrize("path", named(DOCUMENTS))
def test_every_mark_is_followed_by_a_block_that_is_found(path):
    """Fails if a mark is misspelt, or a block is not fenced right after it."""
    text = path.read_text(encoding="utf-8")
    assert len(blocks_of(path)) == text.count("<!-- test")
    assert path in FAST or path != README


@pytest.mark.parametrize("path", named(PAGES))
def test_every_block_of_a_page_is_run_or_says_why_not(path):
    assert unmarked(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", named(FAST))
def test_marked_examples_run(path, tmp_path):
    for block in blocks_of(path):
        if not block.slow:
            check_runs(block, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("path", named(SLOW))
def test_slow_examples_run_after_the_others(path, tmp_path):
    for block in blocks_of(path):
        check_runs(block, tmp_path)


def test_failing_example_fails_the_test(tmp_path):
    """Fails if a bash block goes on after a command that failed."""
    with pytest.raises(AssertionError, match="no run at nowhere"):
        check_runs(Block("bash", "fewstep sample nowhere\ntrue\n", False), tmp_path)


def test_unmarked_blocks_are_left_alone():
    text = "```bash\nfalse\n```\n<!-- test: slow -->\n```bash\na\n```\n<!-- test -->\n\n```python\nb\n```\n"
    assert marked_blocks(text) == [Block("bash", "a\n", True), Block("python", "b\n", False)]
    assert unmarked(text) == ["false"]


def test_a_reason_is_more_than_its_mark():
    """Mutation: a mark without a reason counts."""
    text = (
        "<!-- not run:  -->\n```bash\na\n```\n<!-- not run: it costs an hour -->\n```yaml\nb: 1\n```\n```text\nc\n```\n"
    )
    assert unmarked(text) == ["a"] and marked_blocks(text) == []
