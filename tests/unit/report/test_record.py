"""What a folder says of its run."""

import os
import re

import pytest

from fewstep.report.record import read, read_all


def test_a_finished_run(make_run):
    record = read(make_run())
    assert (record.name, record.title) == ("demo", "fashion-dit by dmd2, 1 step")
    assert record.status == "finished: 600 iterations in 5 min 0 s"
    assert record.metric == "eval/fmd@1000" and record.best == (600, pytest.approx(1.4))
    assert sorted(record.previews) == [100, 200, 300, 400, 500, 600]
    iterations, values = record.series["dm"]
    assert iterations[0] == 10 and len(iterations) == len(values) == 60
    assert "seconds" not in record.series


@pytest.mark.parametrize(("age", "state"), [(1, "running"), (1000, "stopped; --resume goes on")])
def test_an_unfinished_run_goes_on_while_its_figures_are_new(make_run, age, state):
    folder = make_run(done=200)
    stamp = (folder / "metrics.jsonl").stat().st_mtime - age
    os.utime(folder / "metrics.jsonl", (stamp, stamp))
    assert read(folder).status == f"{state}: iteration 200 of 600 after 1 min 40 s"


def test_a_run_that_has_only_begun(make_run):
    """Without figures, pictures or evaluation; and while a line is being written."""
    folder = make_run(rows=[], done=0, evaluated=False)
    record = read(folder)
    assert (record.iteration, record.best, record.previews, record.evaluation) == (0, None, {}, None)
    (folder / "metrics.jsonl").write_text('{"iteration": 10, "dm": 1.0}\n{"iteration": 20, "d')
    assert read(folder).iteration == 10
    (folder / "metrics.jsonl").unlink()
    assert read(folder).iteration == 0


def test_what_is_no_run_is_refused(make_run, tmp_path):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))} is no run's folder.*fewstep list runs"):
        read(tmp_path)
    folder = make_run()
    with pytest.raises(ValueError, match="named twice"):
        read_all([folder, folder.parent / "." / folder.name])
    (folder / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval.json does not parse"):
        read(folder)
    (folder / "config.yaml").write_text("teacher: x")
    with pytest.raises(ValueError, match="is not the configuration of a run"):
        read(folder)
