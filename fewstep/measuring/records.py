"""What is written of a measurement, a line of JSON with all that its figures depend on, and shown of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.environment import describe
from fewstep.measuring.request import Request
from fewstep.metrics.extractors import Extractor
from fewstep.metrics.look import SETTINGS, Scorer
from fewstep.metrics.names import cell
from fewstep.metrics.protocols import Protocol
from fewstep.metrics.suite import over_seeds

FILE = "figures.jsonl"
COLUMNS = {"protocol": "protocol", "n": "samples"}


def described(
    protocol: Protocol, request: Request, extractor: Extractor, scorer: Scorer | None, reference: dict[str, Any]
) -> dict[str, Any]:
    """What every record of a measurement says besides its figures."""
    return {
        "protocol": protocol.name,
        "protocol_hash": protocol.hash,
        "extractor": extractor.protocol | {"verified": extractor.verified},
        "settings": {figure: SETTINGS[figure] for figure in request.also},
        "clip": None if scorer is None else scorer.protocol,
        "reference": reference,
        "environment": describe(),
    }


def over_sets(
    figures: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Mean, deviation and minimum of each figure over sets of samples, two or more."""
    mean, spread = over_seeds(figures)
    return mean, spread, {name: min(found[name] for found in figures) for name in mean}


def table(records: Sequence[dict[str, Any]], told: Mapping[str, str] = COLUMNS) -> str:
    """The figures as markdown, a row for each record.  told: what stands before them, by the records' keys."""
    names = list(records[0]["figures"])

    def row(record: dict[str, Any]) -> list[str]:
        figures, several = record["figures"], "seeds" in record
        shown = record | ({"n": f"{record['seeds']} x {record['n']}"} if several else {})
        cells = [
            cell(name, figures, record["spread"], record["least"]) if several else f"{figures[name]:.5g}"
            for name in names
        ]
        return [*(str(shown[key]) for key in told), *cells]

    rows = [[*told.values(), *names], ["---"] * (len(told) + len(names)), *map(row, records)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a line of JSON to a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
