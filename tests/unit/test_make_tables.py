"""Tables of results: what is compared with what, what is bold, and that every format says the same."""

import csv
import io
import json

import pytest

from eval.make_tables import FORMATS, Line, comma, latex, main, markdown, over_trainings, read, tables


def line(name, protocol="a" * 64, n=10_000, seeds=1, spread=None, **figures):
    return Line(name, 1, figures, n, protocol, seeds, spread or {})


def result(name, fmd, seed=0):
    row = {"figures": {"fmd": fmd, "recall": 0.5}, "spread": {"fmd": 0.1}, "n": 10_000, "seeds": 3}
    return {"name": name, "seed": seed, "nfe": 4.0, "protocol_hash": "a" * 64, "student": row}


def test_best_of_a_column_is_bold_either_way():
    (table,) = tables([line("low", fmd=1.0, recall=0.3, nearest=2.0), line("high", fmd=2.0, recall=0.9, nearest=1.0)])
    assert table.head == ("model", "NFE", "FMD ↓", "recall ↑", "nearest")
    assert table.bold == {(0, 2), (1, 3)}  # nearest has no better
    text = markdown([table])
    assert "| low | 1 | **1** | 0.3 | 2 |" in text and "| high | 1 | 2 | **0.9** | 1 |" in text


def test_a_lone_figure_and_one_that_is_not_finite_are_not_best():
    (table,) = tables([line("a", fmd=float("nan"), recall=0.1), line("b", fmd=1.0)])
    assert table.bold == frozenset()


def test_protocols_do_not_share_a_table():
    """Fails if rows are put together by figure alone."""
    found = tables([line("a", fmd=1.0), line("b", protocol="b" * 64, fmd=0.5)])
    assert [table.rows[0][0] for table in found] == ["a", "b"]
    assert [table.notes[-1] for table in found] == ["protocol aaaaaaaaaaaa", "protocol bbbbbbbbbbbb"]
    assert all(table.bold == frozenset() for table in found)


def test_notes_tell_lines_of_other_sample_counts_apart():
    (table,) = tables(
        [line("a", fmd=1.0), line("b", n=2000, seeds=3, spread={"fmd": 0.25}, fmd=1.0), line("c", fmd=3.0)]
    )
    assert [row[0] for row in table.rows] == ["a¹", "b²", "c¹"]
    assert table.notes[:2] == ("¹ 10,000 samples", "² 3 x 2,000 samples; mean ± deviation over the sets")
    assert table.rows[1][2] == "1 ± 0.25"


def test_seeds_of_training_become_one_line(tmp_path):
    path = tmp_path / "results.jsonl"
    found = [result("tmd", 1.0), result("tmd-seed1", 2.0, 1), result("tmd-seed2", 3.0, 2), result("sid", 5.0)]
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    tmd, sid = over_trainings(read(path))
    assert (tmd.name, tmd.trainings, tmd.figures["fmd"], tmd.spread["fmd"]) == ("tmd", 3, 2.0, 1.0)
    assert (sid.name, sid.trainings, sid.spread["fmd"]) == ("sid", 1, 0.1)
    assert len(read(path)) == 4


def test_the_newest_line_of_a_name_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(result("tmd", 1.0)) + "\n" + json.dumps(result("tmd", 2.0)) + "\n")
    assert [found.figures["fmd"] for found in read(path)] == [2.0]


def test_several_sets_show_their_mean_and_the_least(tmp_path):
    """EDM's rule.  Mutation: the line of all sets counts as one more set, or in the place of the first."""
    told = {"protocol_hash": "e" * 64, "name": "a", "steps": 2, "n": 50_000}
    sets = [told | {"seed": 50_000 * k, "figures": {"FID": 2.0 + k, "IS": 9.0}} for k in range(3)]
    over = {"seed": 0, "seeds": 3, "figures": {"FID": 3.0, "IS": 9.0}, "spread": {"FID": 1.0}, "least": {"FID": 2.0}}
    path = tmp_path / "figures.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*sets, told | over]))
    (table,) = tables(read(path))
    assert table.head == ("model", "NFE", "FID ↓", "IS ↑")
    assert table.rows == (("a", "2", "3 ± 1 (min 2)", "9 ± 0"),)
    assert table.notes[0] == "3 x 50,000 samples; mean ± deviation over the sets"


def test_runs_of_one_teacher_show_it_once(tmp_path):
    lines = []
    for name in ("first", "second"):
        teacher = {"model": "teacher", "steps": 50, "n": 10, "seeds": 1, "stored": True, "figures": {"fmd": 1.0}}
        student = teacher | {"model": "student", "steps": 1, "stored": False}
        rows = [row | {"spread": None} for row in (teacher, student)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "eval.json").write_text(json.dumps({"rows": rows, "protocol_hash": "a" * 64}))
        lines += read(tmp_path / name)
    (table,) = tables(lines)
    assert [row[0] for row in table.rows] == ["teacher", "first: student", "second: student"]


def test_every_format_says_the_same():
    found = tables([line("a_b & c", fmd=1.0, spread={"fmd": 0.5}, recall=0.5), line("d", fmd=2.0, recall=0.25)])
    assert r"a\_b \& c & 1 & \textbf{1 $\pm$ 0.5} & \textbf{0.5} \\" in latex(found) and r"$\downarrow$" in latex(found)
    assert '<th scope="row">a_b &amp; c</th><td>1</td><td><strong>1 ± 0.5</strong></td>' in FORMATS["html"](found)
    head, first, second = csv.reader(io.StringIO(comma(found)))
    assert head == ["protocol", "model", "NFE", "FMD", "recall"]
    assert first == ["aaaaaaaaaaaa", "a_b & c", "1", "1 ± 0.5", "0.5"] and second[1] == "d"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.jsonl", "there is no"),
        (lambda folder: folder, "measure it first: fewstep eval"),
        (lambda folder: _written(folder / "odd.jsonl", '{"name": 1}\n'), "holds no results: KeyError"),
        (lambda folder: _written(folder / "odd.jsonl", "{"), "holds no results: JSONDecodeError"),
    ],
)
def test_what_holds_no_results_is_said(tmp_path, monkeypatch, capsys, make, words):
    monkeypatch.setattr("sys.argv", ["make_tables", str(make(tmp_path))])
    assert main() == 2 and words in capsys.readouterr().err


def _written(path, text):
    path.write_text(text)
    return path


def test_unknown_figure_is_said_with_those_there_are():
    with pytest.raises(ValueError, match="no result has the figure 'fid'; there are fmd, recall"):
        tables([line("a", fmd=1.0, recall=0.5)], ["fid"])


def figures(name, value, seed=None, n=100, protocol="a" * 64, **more):
    return {"name": name, "protocol_hash": protocol, "n": n, "seed": seed, "figures": {"HPSv2.1@100": value}} | more


def test_lines_of_protocols_and_scores_are_read(tmp_path):
    """Sets of other seeds become their mean, the newest of a seed counts, and a folder has no steps."""
    path = tmp_path / "figures.jsonl"
    rows = [figures("run", 1.0, 0, steps=4), figures("run", 9.0, 1, steps=4), figures("run", 3.0, 1, steps=4)]
    rows += [figures("folder", 5.0, intervals={"HPSv2.1@100": [4.0, 6.0]}), figures("folder", 7.0, n=99)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run, folder, fewer = read(path)
    assert (run.figures, run.seeds, run.trainings, run.steps) == ({"HPSv2.1@100": 2.0}, 2, 1, 4)
    assert (folder.steps, folder.spread, folder.interval) == (None, {"HPSv2.1@100": 1.0}, True)
    assert (fewer.n, fewer.interval) == (99, False)
    (table,) = tables([run, folder])
    assert table.head == ("model", "NFE", "HPSv2.1@100 ↑") and table.bold == {(1, 2)}
    assert [row[1:] for row in table.rows] == [("4", "2 ± 1.4"), ("-", "5 ± 1")]
    assert table.notes[0].endswith("over the sets") and table.notes[1].endswith(
        "± half of the 95% interval over prompts"
    )


def test_a_line_without_a_name_has_its_folders(tmp_path):
    """As those of protocols: the images', or the run's that holds the file."""
    (tmp_path / "run").mkdir()
    rows = [figures("", 1.0, images="some/images"), figures("", 2.0, 7, steps=1)]
    (tmp_path / "run" / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [line.name for line in read(tmp_path / "run" / "figures.jsonl")] == ["images", "run"]


def test_images_of_one_name_in_other_folders_are_other_models(tmp_path):
    """In one file, by --to.  Mutations: grouped by name alone, where the last one counts; both shown by it alone."""
    path = tmp_path / "lines.jsonl"
    places = [tmp_path / place / "images" for place in ("a/x", "b/x", "b/y")]
    rows = [figures("", k, images="images", folder=str(place)) for k, place in enumerate(places)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = read(path)
    assert [line.figures["HPSv2.1@100"] for line in lines] == [0, 1, 2]
    (table,) = tables(lines)
    assert [row[0] for row in table.rows] == ["a/x/images", "b/x/images", "y/images"]
    assert [row[0] for row in tables(lines[::2])[0].rows] == ["x/images", "y/images"]
    assert [row[0] for row in tables(lines[:1])[0].rows] == ["images"]


def test_a_run_is_one_model_whichever_file_its_lines_are_in(tmp_path):
    """Also where a line does not say its folder, as those of scores; another run of its name is another."""
    lines = []
    for place in ("a", "b"):
        run = tmp_path / place / "run"
        run.mkdir(parents=True)
        rows = [figures("run", 1.0, 0), figures("run", 3.0, 1, folder=str(run))]
        (run / "figures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += read(run / "figures.jsonl")
    assert [(line.folder, line.seeds, line.figures["HPSv2.1@100"]) for line in lines] == [
        (tmp_path / place / "run", 2, 2.0) for place in ("a", "b")
    ]
    assert [row[0] for row in tables(lines)[0].rows] == ["a/run", "b/run"]
    assert over_trainings(lines) == lines  # two runs, and not two trainings of one


def test_seeds_of_training_lie_beside_each_other(tmp_path):
    """Mutation: the mean is over equal names, wherever they are."""
    lines = [
        Line(f"tmd-seed{seed}", 1, {"fmd": value}, 10, "a" * 64, folder=tmp_path / place / f"tmd-seed{seed}")
        for place, seed, value in (("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 7.0), ("b", 1, 9.0))
    ]
    found = over_trainings(lines)
    assert [(line.name, line.trainings, line.figures["fmd"]) for line in found] == [("tmd", 2, 2.0), ("tmd", 2, 8.0)]
    assert [row[0] for row in tables(found)[0].rows] == ["a/tmd", "b/tmd"]


def test_runs_of_one_name_are_told_apart_by_their_evaluations_too(tmp_path):
    lines = []
    for place in ("a", "b"):
        row = {"model": "student", "steps": 1, "n": 10, "seeds": 1, "stored": False, "figures": {"fmd": 1.0}}
        (tmp_path / place / "run").mkdir(parents=True)
        stored = {"rows": [row | {"spread": None}], "protocol_hash": "a" * 64}
        (tmp_path / place / "run" / "eval.json").write_text(json.dumps(stored))
        lines += read(tmp_path / place / "run")
    assert [row[0] for row in tables(lines)[0].rows] == ["a/run: student", "b/run: student"]
