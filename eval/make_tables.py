"""Tables of measured results, in Markdown, CSV, LaTeX or HTML.

    python -m eval.make_tables SOURCE ... [--format markdown] [--figures fmd,recall] [--over-seeds] [--to FILE]

A source is a run's folder (its eval.json, by `fewstep eval`), or a file of JSON lines: eval/results/compare.jsonl, or
the figures.jsonl that `fewstep eval` with --protocol or --score and `fewstep diversity` add to.
Each protocol has a table of its own: figures of different protocols do not compare, and never share a column.  The best
of a column is bold, arrows say which way is better, and notes below say samples, seeds and protocol.
"""

from __future__ import annotations

import argparse
import csv
import html
import io
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewstep.metrics.names import DOWN, UP, best_rows, cell, heading

MARKS = "⁰¹²³⁴⁵⁶⁷⁸⁹"
"""Of notes, by digit."""


@dataclass(frozen=True)
class Line:
    """One measured model.

    name, steps: the model and its network evaluations, None where only pictures were there.  figures: by name.
    spread: their deviations, or with `interval` half of the 95% interval over prompts.  n, seeds: samples of each of so
    many sets.  least: minima over the sets.  trainings: seeds of training that the figures are means over.
    protocol: its hash.  folder: of the model or its pictures, where that is known; it tells models of one name apart.
    """

    name: str
    steps: float | None
    figures: Mapping[str, float]
    n: int
    protocol: str
    seeds: int = 1
    spread: Mapping[str, float] = field(default_factory=dict)
    trainings: int = 1
    interval: bool = False
    least: Mapping[str, float] = field(default_factory=dict)
    folder: Path | None = None


@dataclass(frozen=True)
class Table:
    """Lines of one protocol, and what stands below them."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    bold: frozenset[tuple[int, int]]
    notes: tuple[str, ...]


def read(source: Path) -> list[Line]:
    """Raises ValueError for what is neither a measured run nor JSON lines of results."""
    path = source / "eval.json" if source.is_dir() else source
    if not path.is_file():
        remedy = f"; measure it first: fewstep eval {source}" if source.is_dir() else ""
        raise ValueError(f"there is no {path}{remedy}")
    try:
        if path.suffix == ".jsonl":
            newest = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            results = {line.name: line for line in (_of_result(found) for found in newest if "student" in found)}
            return [*results.values(), *_of_figures([found for found in newest if "student" not in found], path)]
        record = json.loads(path.read_text(encoding="utf-8"))
        return [_of_row(source, row, record["protocol_hash"]) for row in record["rows"]]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} holds no results: {type(error).__name__} {error}") from error


def _of_row(source: Path, row: Mapping[str, Any], protocol: str) -> Line:
    if row["stored"] or row["model"] == "teacher":
        return _line(row["model"], row, row["steps"], protocol)
    found = _line(f"{source.name}: {row['model']}", row, row["steps"], protocol)
    return replace(found, folder=source.resolve())


def _of_result(found: Mapping[str, Any]) -> Line:
    return _line(found["name"], found["student"], found["nfe"], found["protocol_hash"])


def _of_figures(newest: Sequence[Mapping[str, Any]], path: Path) -> list[Line]:
    """A line for each model, folder, protocol and number of samples; sets of other seeds become their mean.

    Sets of another checkpoint replace the earlier ones.  What stands there of several sets already is of these very
    lines.
    """
    groups: dict[tuple[str, Path | None, str, int], dict[int | None, Mapping[str, Any]]] = {}
    for found in newest:
        if "seeds" in found:
            continue
        folder = _folder(found, path)
        name = found.get("name") or (folder or path.resolve().parent).name
        sets = groups.setdefault((name, folder, found["protocol_hash"], found["n"]), {})
        if any(other.get("iteration") != found.get("iteration") for other in sets.values()):
            sets.clear()
        sets[found.get("seed")] = found
    return [_of_sets(*group, list(sets.values())) for group, sets in groups.items()]


def _folder(found: Mapping[str, Any], path: Path) -> Path | None:
    """As the line says; else the file's own, if that is where what the line names lies."""
    if said := found.get("folder") or found.get("images"):
        return Path(said).resolve()
    own = path.resolve().parent
    return own if found.get("name") in ("", None, own.name) else None


def _of_sets(name: str, folder: Path | None, protocol: str, n: int, sets: Sequence[Mapping[str, Any]]) -> Line:
    lines = []
    for found in sets:
        halves = {figure: (high - low) / 2 for figure, (low, high) in (found.get("intervals") or {}).items()}
        steps, interval = found.get("steps"), bool(halves)
        lines.append(Line(name, steps, found["figures"], n, protocol, spread=halves, interval=interval, folder=folder))
    made = replace(_mean(name, lines), seeds=len(sets), trainings=1)
    least = {figure: min(line.figures[figure] for line in lines) for figure in made.figures}
    return replace(made, least=least if len(sets) > 1 else {})


def _line(name: str, row: Mapping[str, Any], steps: float | None, protocol: str) -> Line:
    return Line(name, steps, row["figures"], row["n"], protocol, row["seeds"], row["spread"] or {})


def over_trainings(lines: Sequence[Line]) -> list[Line]:
    """Lines that differ in the seed of training alone ("NAME-seed1") become one, with mean and deviation over those.

    Their folders lie beside each other: what has one name elsewhere is another model.
    """
    groups: dict[tuple[str, Path | None, float | None, str, int], list[Line]] = {}
    for line in lines:
        stem, _, seed = line.name.rpartition("-seed")
        name = stem if stem and seed.isdecimal() else line.name
        folder = line.folder and line.folder.with_name(name)
        groups.setdefault((name, folder, line.steps, line.protocol, line.n), []).append(line)
    return [_mean(name, group) for (name, *_), group in groups.items()]


def _mean(name: str, group: Sequence[Line]) -> Line:
    if len(group) == 1:
        return group[0]
    shared = [figure for figure in group[0].figures if all(figure in line.figures for line in group)]
    values = {figure: [line.figures[figure] for line in group] for figure in shared}
    return replace(
        group[0],
        name=name,
        figures={figure: statistics.fmean(found) for figure, found in values.items()},
        spread={figure: statistics.stdev(found) for figure, found in values.items()},
        trainings=len(group),
        interval=False,
        least={},
    )


def tables(lines: Sequence[Line], figures: Sequence[str] = ()) -> list[Table]:
    """One for each protocol.  figures: which columns, in this order; by default all.

    Raises ValueError for a figure that no line has.
    """
    known = list(dict.fromkeys(name for line in lines for name in line.figures))
    if unknown := [name for name in figures if name not in known]:
        raise ValueError(f"no result has the figure {unknown[0]!r}; there are {', '.join(known)}")
    protocols = dict.fromkeys(line.protocol for line in lines)
    return [_table([line for line in lines if line.protocol == protocol], figures or known) for protocol in protocols]


def _table(lines: Sequence[Line], figures: Sequence[str]) -> Table:
    columns = [name for name in figures if any(name in line.figures for line in lines)]
    lines = _distinct(lines)
    kinds = list(dict.fromkeys(_kind(line) for line in lines))
    marks = {kind: _mark(place) if len(kinds) > 1 else "" for place, kind in enumerate(kinds)}
    rows, bold = [], set()
    for line, name in zip(lines, _names(lines)):
        cells = [cell(column, line.figures, line.spread, line.least) for column in columns]
        rows.append((name + marks[_kind(line)], "-" if line.steps is None else f"{line.steps:g}", *cells))
    for place, name in enumerate(columns):
        for row in best_rows(name, [line.figures for line in lines]):
            bold.add((row, place + 2))
    notes = [f"{marks[kind]} {kind}".strip() for kind in kinds] + [f"protocol {lines[0].protocol[:12]}"]
    head = ("model", "NFE", *map(heading, columns))
    return Table(head, tuple(rows), frozenset(bold), tuple(notes))


def _distinct(lines: Sequence[Line]) -> list[Line]:
    """Without what is there twice, as one teacher beside several students."""
    found: list[Line] = []
    for line in lines:
        if line not in found:
            found.append(line)
    return found


def _names(lines: Sequence[Line]) -> list[str]:
    """The lines' names, where two are equal with as many of the folders above them as tell them apart."""

    def name_of(line: Line) -> str:
        others = {other.folder for other in lines if other.name == line.name and other.folder} - {line.folder}
        if line.folder is None or not others:
            return line.name
        parts = line.folder.parts
        depth = next(k for k in range(2, len(parts) + 2) if all(other.parts[-k:] != parts[-k:] for other in others))
        return Path(*parts[-depth:-1], line.name).as_posix()

    return [name_of(line) for line in lines]


def _mark(place: int) -> str:
    return "".join(MARKS[int(digit)] for digit in str(place + 1))


def _kind(line: Line) -> str:
    """How a line was measured: what a note says of it."""
    sets = f"{line.n:,} samples" if line.seeds == 1 else f"{line.seeds} x {line.n:,} samples"
    if line.trainings > 1:
        return f"{sets} of each of {line.trainings} trainings; mean ± deviation over these"
    if line.interval:
        return f"{sets}; ± half of the 95% interval over prompts"
    return f"{sets}; mean ± deviation over the sets" if line.seeds > 1 else sets


def markdown(found: Sequence[Table]) -> str:
    """GitHub's tables, each with its notes below."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    def one(table: Table) -> str:
        rows = [
            [_strong(table, i, j, cell, "**{}**") for j, cell in enumerate(row)] for i, row in enumerate(table.rows)
        ]
        rule = ["---", *["--:"] * (len(table.head) - 1)]
        return "\n".join([*map(line, [table.head, rule, *rows]), "", *(f"{note}  " for note in table.notes)])

    return "\n\n".join(map(one, found)) + "\n"


def comma(found: Sequence[Table]) -> str:
    """One CSV of all; the protocol is a column, and numbers carry no marks."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for table in found:
        writer.writerow(["protocol", *(name.removesuffix(f" {UP}").removesuffix(f" {DOWN}") for name in table.head)])
        for row in table.rows:
            writer.writerow([table.notes[-1].removeprefix("protocol "), row[0].rstrip(MARKS), *row[1:]])
    return text.getvalue()


TEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", UP: r"$\uparrow$", DOWN: r"$\downarrow$", "~": r"\textasciitilde{}"}
TEX |= {mark: f"$^{digit}$" for digit, mark in enumerate(MARKS)}
TEX |= {"^": r"\textasciicircum{}"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def latex(found: Sequence[Table]) -> str:
    """tabular with booktabs' rules."""

    def text(cell: str) -> str:
        return "".join(TEX.get(sign, sign) for sign in cell)

    def one(table: Table) -> str:
        rows = [
            [_strong(table, i, j, text(cell), r"\textbf{{{}}}") for j, cell in enumerate(row)]
            for i, row in enumerate(table.rows)
        ]
        lines = [rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(text, table.head)) + r" \\", r"\midrule"]
        lines += [" & ".join(row) + r" \\" for row in rows]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in table.notes)])

    return "\n\n".join(map(one, found)) + "\n"


def hypertext(found: Sequence[Table]) -> str:
    """Tables of HTML, to stand in a page."""

    def one(table: Table) -> str:
        head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.head)
        rows = []
        for i, row in enumerate(table.rows):
            cells = [_strong(table, i, j, html.escape(cell), "<strong>{}</strong>") for j, cell in enumerate(row)]
            rows.append(
                f'<tr><th scope="row">{cells[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in cells[1:]) + "</tr>"
            )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in table.notes)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{notes}"

    return "\n".join(map(one, found)) + "\n"


def _strong(table: Table, row: int, column: int, cell: str, form: str) -> str:
    return form.format(cell) if (row, column) in table.bold else cell


FORMATS: dict[str, Callable[[Sequence[Table]], str]] = {
    "markdown": markdown,
    "csv": comma,
    "latex": latex,
    "html": hypertext,
}


def main() -> int:
    """Print the tables, or write them; 2 for what cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument("--figures", default="", help="names of figures, with commas; all by default")
    parser.add_argument("--over-seeds", action="store_true", help="one line for all seeds of a training")
    parser.add_argument("--to", type=Path, help="the file; default: standard output")
    options = parser.parse_args()
    try:
        lines = [line for source in options.sources for line in read(source)]
        lines = over_trainings(lines) if options.over_seeds else lines
        text = FORMATS[options.format](tables(lines, [name for name in options.figures.split(",") if name]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.to is None:
        print(text, end="")
    else:
        options.to.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
