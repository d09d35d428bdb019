"""The page: what a run's folder holds, as one HTML file that asks nothing of a network."""

from __future__ import annotations

import importlib.resources
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fewstep.advice import advice
from fewstep.files import write_text
from fewstep.metrics.names import best_rows, cell, heading
from fewstep.report.curves import charts, colours
from fewstep.report.frames import Frame, frames
from fewstep.report.record import Record, read_all

MAIN = 6
"""Charts that are open; the rest are folded away."""


def write_report(runs: Sequence[Path], to: Path | None = None) -> Path:
    """Write the page of a run, or of several beside each other.  Returns where.

    to: by default report.html in the first run's folder.
    Raises ValueError for a folder that is no run's.
    """
    records = read_all(runs)
    path = to or runs[0] / "report.html"
    if path.is_dir():
        raise ValueError(f"--to {path} is a folder; name the file, as {path / 'report.html'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, render(records))
    return path


def render(records: Sequence[Record], *, refresh: int | None = None) -> str:
    """The page's HTML.  refresh: seconds after which a browser loads it again, for a run that goes on."""
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment

    drawn = charts(records)
    script, parts = components([chart.model for chart in drawn]) if drawn else ("", ())
    here = importlib.resources.files("fewstep.report")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        here.joinpath("page.html.j2").read_text(encoding="utf-8")
    )
    shown = [frames(record) for record in records]
    return template.render(
        title=" and ".join(record.name for record in records),
        refresh=refresh,
        css=here.joinpath("page.css").read_text(encoding="utf-8"),
        js=here.joinpath("page.js").read_text(encoding="utf-8"),
        bokeh="".join(Resources("inline", components=["bokeh"]).js_raw) if drawn else "",
        script=script,
        charts=[(chart.name, part) for chart, part in zip(drawn, parts)],
        main=MAIN,
        runs=[_run(record, colour, made) for record, colour, made in zip(records, colours(len(records)), shown)],
        moments=sorted({frame.iteration for made in shown for frame in made}),
        table=_table(records),
        differences=_differences(records),
    )


def _run(record: Record, colour: str, made: Sequence[Frame]) -> dict[str, Any]:
    """What the template says of a run by itself."""
    return {
        "name": record.name,
        "title": record.title,
        "colour": colour,
        "status": record.status,
        "best": record.best,
        "metric": (record.metric or "").removeprefix("eval/"),
        "advice": list(advice(record.rows, record.config["train"]).values()),
        "frames": made,
        "config": yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True),
        "environment": _environment(record.environment),
        "commands": _commands(record),
    }


def _environment(told: dict[str, Any]) -> list[tuple[str, str]]:
    """Versions and hardware, a line each."""
    packages = [(name, str(version)) for name, version in told.get("packages", {}).items()]
    others = [
        (name, str(told[name]))
        for name in ("python", "platform", "processors", "threads", "accelerator", "revision")
        if told.get(name) is not None
    ]
    return [*others, *packages]


def _commands(record: Record) -> list[str]:
    """How to make the run again: the very configuration on the same commit."""
    revision = record.environment.get("revision")
    checkout = [f"git checkout {revision}"] if isinstance(revision, str) and revision else []
    config = shlex.quote(str(record.folder / "config.yaml"))
    return [
        *checkout,
        f"fewstep distill --config {config} --out {shlex.quote(str(record.folder) + '-again')}",
        f"fewstep eval {shlex.quote(str(record.folder) + '-again')}",
    ]


def _table(records: Sequence[Record]) -> dict[str, Any] | None:
    """Rows of `fewstep eval`, one protocol a block: figures of different protocols are no neighbours."""
    blocks: dict[str, list[tuple[str, dict[str, Any]]]] = {}
    for record in records:
        if record.evaluation is None:
            continue
        rows = blocks.setdefault(record.evaluation["protocol_hash"], [])
        for row in record.evaluation["rows"]:
            name = f"{record.name}: {row['model']}" if len(records) > 1 else row["model"]
            if row["model"] == "teacher" and any(row == other for _, other in rows):
                continue  # one teacher of several runs
            rows.append((name, row))
    if not blocks:
        return None
    return {"blocks": [_block(protocol, rows) for protocol, rows in blocks.items()]}


def _block(protocol: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    figures = [row["figures"] for _, row in rows]
    names = list(dict.fromkeys(name for found in figures for name in found))
    best = {name: best_rows(name, figures) for name in names}
    return {
        "protocol": protocol,
        "head": [heading(name) for name in names],
        "rows": [
            {
                "model": model + (" (stored)" if row["stored"] else ""),
                "steps": row["steps"],
                "samples": f"{row['n']:,}" if row["seeds"] == 1 else f"{row['seeds']} x {row['n']:,}",
                "cells": [(cell(name, row["figures"], row.get("spread")), place in best[name]) for name in names],
            }
            for place, (model, row) in enumerate(rows)
        ],
    }


def _differences(records: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Settings in which runs differ, each with its value in every run."""
    if len(records) < 2:
        return []
    flat = [_flat(record.config) for record in records]
    names = list(dict.fromkeys(name for settings in flat for name in settings))
    found = [(name, [str(settings.get(name, "-")) for settings in flat]) for name in names]
    return [(name, values) for name, values in found if len(set(values)) > 1]


def _flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {prefix: settings}
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
