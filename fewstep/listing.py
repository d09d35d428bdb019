"""What `fewstep list` shows: teachers, methods with their settings, runs, kernels.  No torch here but for kernels."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Column, Table

NEEDS = {
    "latents": "real samples (the teacher's own, or --data)",
    "pairs": "pairs of noise and the teacher's samples (fewstep pairs, --pairs)",
    "blocks": "a transformer on rectified flow, whose last blocks can be run apart",
    "lpips": "LPIPS of decoded pictures",
    "black": "a black picture",
    "clip": "a CLIP, and decoded pictures",
    "jvp": "networks with sound derivatives along a path, which it checks before training",
}
"""What a method asks for beside prompts, in words."""


def table_of(what: str, runs: Path, *, plugins: bool) -> Table | Group:
    """The table of teachers, methods, runs (in the folder `runs`), protocols, scores, kernels, or a method's settings.

    plugins: some were loaded, so that the registries know more than the index made at build time.
    Raises LookupError for anything else.
    """
    index = _index(plugins)
    methods, name = index["methods"], what.replace("-", "_")
    if what == "teachers":
        return _teachers(index["teachers"])
    if what == "methods":
        return _table("method", "what it is", rows=[(k, v["summary"]) for k, v in methods.items()])
    if what == "runs":
        return _table("run", "teacher", "method", "iterations", "best", rows=list(_runs(runs)))
    if what == "protocols":
        return _protocols()
    if what == "scores":
        return _scores()
    if what == "kernels":
        return Group(*_kernels())
    if name in methods:
        fields = [(f["name"], f["type"], f["default"], f["note"]) for f in methods[name]["fields"]]
        settings = _table("setting (--set method.NAME=VALUE)", "type", "default", "note", rows=fields)
        return Group(*_about(name, methods[name]), settings)
    raise LookupError(
        f"nothing called {what!r} to list; allowed: teachers, methods, runs, protocols, scores, kernels, "
        + ", ".join(methods)
    )


def _teachers(teachers: dict[str, Any]) -> Group:
    """Each with its size and licence, where it is a published one, and the methods that have a recipe for it."""
    rows = [
        (
            name,
            told["summary"] + (f"; {told['caution']}" if told.get("caution") else ""),
            f"{told['parameters']}M" if "parameters" in told else "",
            told.get("licence", "") + "".join(f"; {word}" for word in told.get("restrictions", ())),
            ", ".join(told["recipes"]),
        )
        for name, told in teachers.items()
    ]
    return Group(
        _table("teacher", "what it is", "parameters", "licence", "recipes", rows=rows),
        "Any folder or hub id of a pipeline of theirs can be named, too; fewstep list NAME tells what a method needs.",
    )


def _about(name: str, method: dict[str, Any]) -> Iterator[str]:
    """What a method is, by its defaults: a line each."""
    yield escape(f"{name}: {method['summary']}")
    if method["about"]:
        yield escape(method["about"])
    yield ""
    papers = ", ".join(f"https://arxiv.org/abs/{paper}" for paper in method["papers"])
    yield f"papers  {papers or '-'}"
    phases = f", in {method['stages']} stages" if method["stages"] > 1 else ""
    yield f"trains  {', '.join(method['trains']).replace('_', ' ')}{phases}"
    yield f"reads   {', '.join(['prompts', *(NEEDS[need] for need in method['needs'])])}"


def _protocols() -> Table:
    from fewstep.metrics.protocols import PROTOCOLS

    rows = [
        (name, found.source, found.extractor, " ".join(found.figures), found.count, found.reference)
        for name, found in PROTOCOLS.items()
    ]
    return _table("protocol", "source", "extractor", "figures", "samples", "reference", rows=rows)


def _scores() -> Group:
    """Those that other environments give, and how these are made."""
    from fewstep.metrics.outside.scores import SCORES

    rows = [
        (
            name,
            found.source,
            "any" if found.count is None else found.count,
            found.prompts,
            escape(found.environment),
            escape(", ".join(found.options)),
        )
        for name, found in SCORES.items()
    ]
    return Group(
        _table("score", "source", "number", "prompts (--prompts)", "environment (--python)", "--option", rows=rows),
        "An adapter of your own: --score FILE.py. None of these has given a published figure yet.",
    )


def _kernels() -> Iterator[Table | str]:
    """Which backends of the fused operators run here, and which operators each has."""
    from fewstep_cuda import backends, operators  # imports torch, which no other list needs

    states = backends()
    yield _table("backend", "here", rows=[(name, escape(state)) for name, state in states.items()])
    cells = [
        (operator, *("yes" if name in found else "" for name in states)) for operator, found in operators().items()
    ]
    yield _table("operator", *states, rows=cells)
    asked = os.environ.get("FEWSTEP_KERNELS")
    yield escape(
        f"FEWSTEP_KERNELS={asked} decides" if asked else "The fastest that can is taken; FEWSTEP_KERNELS names another."
    )


def _index(plugins: bool) -> dict[str, Any]:
    if not plugins:
        return json.loads((Path(__file__).parent / "index.json").read_text(encoding="utf-8"))
    from fewstep.index import build_index

    return build_index()


def _table(*columns: str, rows: list[Any]) -> Table:
    table = Table(*(Column(column, overflow="fold") for column in columns))
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def _runs(root: Path) -> Iterator[tuple[str, ...]]:
    import yaml

    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; name the one that holds the runs with --runs")
    for path in sorted(root.glob("*/config.yaml")):
        saved = sorted(path.parent.glob("checkpoints/*/state.json"))
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
            best = json.loads(saved[-1].read_text(encoding="utf-8"))["progress"]["best"] if saved else None
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path.parent} cannot be listed: {error}") from error
        done = saved[-1].parent.name.lstrip("0") if saved else "0"
        found = f"{best['rank']:.4g} at {best['iteration']}" if best else "-"
        yield (
            str(path.parent),
            config["teacher"]["name"],
            config["method"]["name"],
            f"{done}/{config['train']['iterations']}",
            found,
        )
