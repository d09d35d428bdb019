"""Which curves there are, and what they hold."""

import math

from bokeh.models import HoverTool, LogScale, Span

from fewstep.report.curves import charts
from fewstep.report.record import read, read_all


def data(chart):
    return [renderer.data_source.data for renderer in chart.model.renderers]


def test_evaluations_come_first_and_all_share_one_range(make_run):
    drawn = charts([read(make_run())])
    names = ["eval/fmd@1000", "dm", "critic", "dm/gap_rms", "dm/weight", "x/std", "generator/grad_norm"]
    assert [chart.name for chart in drawn] == names
    assert len({id(chart.model.x_range) for chart in drawn}) == 1
    assert (drawn[0].model.x_range.start, drawn[0].model.x_range.end) == (0, 600)
    assert [span.location for span in drawn[0].model.select(Span)] == [600]


def test_curve_holds_the_runs_numbers_and_hover_tells_them(make_run):
    record = read(make_run())
    (chart,) = [chart for chart in charts([record]) if chart.name == "dm"]
    assert data(chart)[0]["iteration"] == record.series["dm"][0] and data(chart)[0]["value"] == record.series["dm"][1]
    (hover,) = chart.model.select(HoverTool)
    assert hover.mode == "vline" and ("iteration", "@iteration") in hover.tooltips
    assert len(hover.renderers) == 1  # not the running mean's too


def test_wide_ranges_are_logarithmic_and_holes_stay(make_run):
    rows = [{"iteration": i, "wide": 10.0**i, "holed": math.nan if i == 2 else 1.0 * i} for i in range(1, 6)]
    wide, holed = charts([read(make_run(rows=rows, done=0))])
    assert isinstance(wide.model.y_scale, LogScale) and "log scale" in wide.model.title.text
    assert math.isnan(data(holed)[0]["value"][1]) and not math.isnan(data(holed)[0]["smooth"][1])


def test_skipped_updates_are_drawn_if_there_are_any(make_run):
    rows = [{"iteration": i, "dm": 1.0, "skipped": i // 2} for i in range(5)]
    assert "skipped" in [chart.name for chart in charts([read(make_run(rows=rows, done=0))])]


def test_runs_have_their_colours_in_every_chart(make_run):
    """Fails if colours count only the runs that have a figure: a run would change its colour from chart to chart."""
    first = make_run("first", rows=[{"iteration": 1, "a": 1.0}], done=0)
    second = make_run("second", rows=[{"iteration": 1, "a": 1.0, "b": 2.0}], done=0)
    found = {chart.name: chart.model for chart in charts(read_all([first, second]))}
    colours = [renderer.glyph.line_color for renderer in found["a"].renderers[::2]]
    assert len(set(colours)) == 2 and found["b"].renderers[0].glyph.line_color == colours[1]
