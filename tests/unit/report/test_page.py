"""The page: whole, by itself, and safe whatever a run is called."""

import re

import pytest

from fewstep.report import frames as module
from fewstep.report.frames import frames
from fewstep.report.page import render, write_report
from fewstep.report.record import read, read_all


def text(html):
    """Without scripts, styles and tags."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", " ", html, flags=re.S))


def test_page_of_one_run(make_run):
    folder = make_run()
    path = write_report([folder])
    html = path.read_text(encoding="utf-8")
    assert path == folder / "report.html" and path.stat().st_size < 3e6
    said = text(html)
    for words in (
        "fashion-dit by dmd2, 1 step",
        "finished: 600 iterations",
        "best fmd@1000 1.4 at iteration 600",
        "Nothing in the figures speaks against this run",
        "teacher (stored)",
        "FMD ↓",
        "recall ↑",
        "guidance: 1.2",
        "2.14.1",
        f"git checkout {'0' * 40}",
        f"fewstep distill --config {folder / 'config.yaml'}",
    ):
        assert words in said, words
    assert html.count("<img ") == 6 and html.count(" hidden>") == 5
    assert "<strong>1.425</strong>" in html and "<strong>1.485</strong>" not in html


def test_nothing_is_asked_of_a_network(make_run):
    """Fails if Bokeh's files are linked and not held."""
    html = render([read(make_run())])
    assert not re.findall(r"""<(?:script|link|img)[^>]*(?:src|href)=["']?(?!data:)[^"'#>\s]""", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("name", ["<script>alert(1)<", "<!--<script>", "a & b", '"quoted"'])
def test_names_are_text(make_run, name):
    """Fails if the template does not escape, or Bokeh's data end its script."""
    folder = make_run("plain")
    odd = folder.rename(folder.parent / name)
    html = render(read_all([odd, make_run("other")]))
    assert name not in html or name == '"quoted"'
    assert "<b>bold" not in html
    assert len(re.findall("<script", html)) == len(re.findall("</script>", html))


def test_several_runs_stand_beside_each_other(make_run):
    first, second = make_run("first"), make_run("second", method="sid", iterations=800, done=400, every=80)
    html = render(read_all([first, second]))
    said = text(html)
    for words in ("first and second", "first: teacher (stored)", "second: student", "method.name", "train.iterations"):
        assert words in " ".join(said.split()), words
    assert "second: teacher" not in said  # the same row
    assert "method.guidance" not in said  # no difference
    moments = re.search(r'data-moments="([^"]*)"', html)
    assert moments and moments[1] == "80,100,160,200,240,300,320,400,500,600"


def test_figures_of_different_protocols_are_no_neighbours(make_run):
    first, second = make_run("first"), make_run("second")
    told = second / "eval.json"
    told.write_text(told.read_text().replace("a" * 64, "b" * 64))
    html = render(read_all([first, second]))
    assert "Protocol aaaaaaaaaaaa" in html and "Protocol bbbbbbbbbbbb" in html
    assert "their figures do not compare" in html


def test_a_run_that_has_only_begun(make_run):
    said = text(render([read(make_run(rows=[], done=0, evaluated=False))]))
    assert "No grid yet" in said and "No figures yet" in said


def test_many_grids_are_thinned_out_and_keep_first_last_and_best(make_run):
    record = read(make_run(done=5000, iterations=5000, every=50))
    assert len(record.previews) == 100
    values = record.series["eval/fmd@1000"][1]
    values[36] = -10.0
    kept = [frame.iteration for frame in frames(record)]
    assert len(kept) <= module.FRAMES and kept[0] == 50 and kept[-1] == 5000
    assert record.best == (1850, -10.0) and 1850 in kept


def test_large_grids_are_made_smaller(make_run):
    from PIL import Image

    folder = make_run(done=100)
    Image.new("RGB", (4000, 1000)).save(folder / "previews" / "00000100.png")
    (frame,) = frames(read(folder))
    assert (frame.width, frame.height) == (module.SIDE, module.SIDE // 4)


def test_where_to_write(make_run, tmp_path):
    folder = make_run()
    assert write_report([folder], tmp_path / "new" / "page.html").is_file()
    with pytest.raises(ValueError, match="is a folder; name the file"):
        write_report([folder], tmp_path)
