"""Writes index.json: names, fields and one-line descriptions for `fewstep list`, so that listing needs no torch.

python -m fewstep.index      # after adding a method or teacher; a test fails until it was run
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "index.json"


def build_index() -> dict[str, Any]:
    """The registries' content as plain data."""
    import fewstep.api  # noqa: F401 - registers everything that comes with the package
    from fewstep.objectives.base import METHODS
    from fewstep.teachers.base import TEACHERS

    return {
        "methods": {
            name: {"summary": _summary(METHODS.get(name)), **_told(METHODS.get(name))} for name in METHODS.names()
        },
        "teachers": {name: _brought(name, TEACHERS.get(name), METHODS.names()) for name in TEACHERS.names()},
    }


def _brought(name: str, teacher: Any, methods: list[str]) -> dict[str, Any]:
    """What there is to know of a teacher without loading it."""
    from fewstep.config import recipe_of
    from fewstep.teachers.published import Published

    recipes = [method for method in methods if recipe_of(name, method)]
    if not isinstance(teacher, Published):
        return {"summary": _summary(teacher), "recipes": recipes}
    about = f"{teacher.about} ({teacher.source})"
    told = {"licence": teacher.licence, "parameters": teacher.parameters, "caution": teacher.caution}
    told |= {"restrictions": list(teacher.restrictions)} if teacher.restrictions else {}
    return {"summary": about, "recipes": recipes, **told}


def _summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def _told(cls: type) -> dict[str, Any]:
    """What there is to know of a method: its constraints in words, papers, networks, data, settings."""
    from fewstep.objectives.base import stages_of

    plain = cls()
    text = inspect.getdoc(cls) or ""
    papers = re.findall(r"\b\d{4}\.\d{5}\b", f"{inspect.getdoc(inspect.getmodule(cls))} {text}")
    return {
        "about": " ".join("\n\n".join(text.split("\n\n")[1:]).split()),
        "papers": list(dict.fromkeys(papers)),
        "trains": ["generator", *sorted(plain.roles)],
        "needs": sorted(plain.needs),
        "stages": len(stages_of(plain)),
        "fields": _fields(cls),
    }


def _fields(cls: type) -> list[dict[str, str]]:
    """Name, type, default and trailing comment (the default's source) of each field, inherited ones too."""
    notes: dict[str, str] = {}
    for owner in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        notes |= _comments(owner)
    return [
        {"name": f.name, "type": str(f.type), "default": _shown(f.default), "note": notes.get(f.name, "")}
        for f in dataclasses.fields(cls)
    ]


def _shown(default: Any) -> str:
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        return ", ".join(f"{f.name}={getattr(default, f.name)}" for f in dataclasses.fields(default))
    return str(default)


def _comments(cls: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    fields = [node for node in body.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    found = {}
    for node in fields:
        _, mark, comment = lines[node.lineno - 1].partition("  # ")
        if mark and isinstance(node.target, ast.Name):
            found[node.target.id] = comment.strip()
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps(build_index(), indent=1, sort_keys=True) + "\n", encoding="utf-8")
