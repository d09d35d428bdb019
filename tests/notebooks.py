"""Notebooks from top to bottom: python -m tests.notebooks [NAME ...] runs them and stores what their cells show."""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def execute(notebook: dict[str, Any]) -> dict[str, Any]:
    """Run all cells in one namespace, in the present folder.  Returns the notebook with its outputs (nbformat 4.5)."""
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            count = sum(c["cell_type"] == "code" for c in cells) + 1
            cell = {**cell, "execution_count": count, "outputs": _outputs(source(cell), cell["id"], names, count)}
        cells.append(cell)
    return {**notebook, "cells": cells}


def _outputs(code: str, name: str, names: dict[str, Any], count: int) -> list[dict[str, Any]]:
    """What a cell prints, and the value of its last line if that is an expression."""
    tree, value = ast.parse(code), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, name, "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), names)
    text, outputs = printed.getvalue().splitlines(keepends=True), []
    if text:
        outputs.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        more = {"execution_count": count, "metadata": {}, "output_type": "execute_result"}
        outputs.append({"data": _data(value), **more})
    return outputs


def _data(value: Any) -> dict[str, Any]:
    """By MIME type, as Jupyter shows it."""
    if not isinstance(value, Image.Image):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    file = io.BytesIO()
    value.save(file, "png", optimize=True)
    words = f"a picture, {value.width} x {value.height}"  # its repr has an address, new in every run
    return {"image/png": base64.b64encode(file.getvalue()).decode() + "\n", "text/plain": [words]}


def main(wanted: list[str]) -> None:
    for path in NOTEBOOKS:
        if not wanted or path.stem in wanted:
            with tempfile.TemporaryDirectory() as folder:
                home = os.getcwd()
                os.chdir(folder)
                try:
                    made = execute(read(path))
                finally:
                    os.chdir(home)
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
