"""Curves of a run's figures, with hover, drawn by Bokeh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from fewstep.report.record import Record

COLOURS = ("#1f5fa8", "#d1642c", "#2f8f5b", "#8a4fa3", "#b08a1e", "#4a4a4a", "#c0397b", "#1e98a8")
"""Of runs, in the order that they are named."""
SMOOTH = 40
"""Points from which a curve gets a running mean."""


class Chart(NamedTuple):
    """A figure's name and its Bokeh model."""

    name: str
    model: Any


def charts(records: Sequence[Record]) -> list[Chart]:
    """One for each figure that any of the runs has, evaluations first; all share their range of iterations."""
    from bokeh.models import Range1d

    names = list(dict.fromkeys(name for record in records for name in record.series))
    names.sort(key=lambda name: (not name.startswith("eval/"), name.count("/")))
    end = max([record.iterations for record in records] + [record.iteration for record in records])
    shared = Range1d(start=0, end=end, bounds=(0, end))
    return [Chart(name, _chart(name, records, shared)) for name in names if not _constant(name, records)]


def _constant(name: str, records: Sequence[Record]) -> bool:
    """Counts that never move, as of skipped updates, are told in words elsewhere."""
    values = [value for record in records if name in record.series for value in record.series[name][1]]
    return name in ("generator_updates", "skipped") and (name == "generator_updates" or max(values) == 0)


def _chart(name: str, records: Sequence[Record], shared: Any) -> Any:
    from bokeh.models import ColumnDataSource, HoverTool, Span
    from bokeh.plotting import figure

    having = [(colour, record) for colour, record in zip(colours(len(records)), records) if name in record.series]
    values = [value for _, record in having for value in record.series[name][1] if math.isfinite(value)]
    log = bool(values) and min(values) > 0 and max(values) > 30 * min(values)
    chart: Any = figure(
        x_range=shared,
        y_axis_type="log" if log else "linear",
        height=220,
        min_width=260,
        sizing_mode="stretch_width",
        tools="xpan,xwheel_zoom,box_zoom,reset",
        active_drag=None,  # a finger that scrolls the page
        active_scroll=None,
        toolbar_location="above",
        title=name.removeprefix("eval/") + (" (log scale)" if log else ""),
    )
    few = all(len(record.series[name][0]) < SMOOTH for _, record in having)
    lines = []
    for colour, record in having:
        iterations, found = record.series[name]
        shown = [value if math.isfinite(value) else float("nan") for value in found]
        data = {"iteration": iterations, "value": shown, "run": [record.name] * len(shown)}
        source = ColumnDataSource(data | {"smooth": _smooth(shown)})
        line = chart.line("iteration", "value", source=source, color=colour, width=1.5, alpha=1 if few else 0.35)
        lines.append(line)
        if few:
            chart.scatter("iteration", "value", source=source, color=colour, size=5)
        else:
            chart.line("iteration", "smooth", source=source, color=colour, width=2)
        if record.metric == name and record.best is not None:
            chart.add_layout(Span(location=record.best[0], dimension="height", line_color=colour, line_dash="dashed"))
    told = [("run", "@run")] if len(records) > 1 else []
    tips = [*told, ("iteration", "@iteration"), (name.removeprefix("eval/"), "@value{0.0000}")]
    chart.add_tools(HoverTool(renderers=lines, tooltips=tips, mode="vline"))
    chart.toolbar.logo, chart.toolbar.autohide = None, True
    chart.title.text_font_size = "13px"
    chart.grid.grid_line_color = "#e6e6e6"
    return chart


def colours(count: int) -> list[str]:
    """Of so many runs, in their order."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Running mean with the bias of its start taken out; what is not finite is passed over."""
    found, mean, mass = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            mean, mass = weight * mean + (1 - weight) * value, weight * mass + 1 - weight
        found.append(mean / mass if mass else float("nan"))
    return found
