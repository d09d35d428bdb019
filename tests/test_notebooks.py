"""Notebooks run from top to bottom, and what is stored in them is small and what their text speaks of."""

import base64
import json
import re

import pytest

from tests.notebooks import NOTEBOOKS, execute, read, source

EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
DECIMAL = re.compile(r"\d*\.\d+")
PICTURE = 60_000
"""Bytes of a picture at the most: it is in every diff of its notebook."""


@pytest.mark.slow
@EACH
def test_every_cell_runs(path, tmp_path, monkeypatch):
    """And shows what is stored, in kind: figures of a training differ from machine to machine."""
    monkeypatch.chdir(tmp_path)
    stored = read(path)
    assert shown(execute(stored)) == shown(stored)


def shown(notebook) -> list[list[list[str]]]:
    """What each cell of code shows: the kinds of its outputs."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return [[sorted(out.get("data", [out["output_type"]])) for out in cell["outputs"]] for cell in cells]


@EACH
def test_outputs_are_stored_and_small(path):
    """Fails for a notebook that was never run, and for outputs with a path of the machine that ran it."""
    cells = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    outputs = [out for cell in cells for out in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [base64.b64decode(out["data"]["image/png"]) for out in outputs if "image/png" in out.get("data", ())]
    assert pictures and max(map(len, pictures)) < PICTURE
    assert not re.search(r"/(tmp|home|root|work)/", json.dumps([out for out in outputs if "data" not in out]))


@EACH
def test_figures_in_the_text_are_those_that_the_run_gives(path):
    """Decimals of a paragraph stand in an output or in the code, but for those of a paper that it names by arXiv."""
    cells = read(path)["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    given = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "code")
    given += "\n".join("".join(out.get("text", out.get("data", {}).get("text/plain", ""))) for out in outputs)
    text = [part for cell in cells if cell["cell_type"] == "markdown" for part in source(cell).split("\n\n")]
    figures = {figure for part in text if "arXiv" not in part for figure in DECIMAL.findall(part)}
    assert figures - set(DECIMAL.findall(given)) == set()
