"""The table that says how good a student is."""

import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import fewstep
from fewstep.evaluation import Row, evaluate_run, markdown
from fewstep.sampling import sample_teacher
from fewstep.students import untrained_student
from fewstep.teachers.base import TEACHERS
from fewstep.training.preview import Preview

STORED = (
    {"steps": 4, "n": 10_000, "seed": 1, "cfg": 1.0, "fmd": 2.0, "agreement": 0.9},
    {"steps": 50, "n": 2_000, "seed": 1, "cfg": 1.0, "fmd": 3.0, "agreement": 0.9},
    {"steps": 50, "n": 10_000, "seed": 1, "cfg": 1.0, "fmd": 4.5, "agreement": 0.97},
    {"steps": 50, "n": 10_000, "seed": 1, "cfg": 3.0, "fmd": 6.0, "agreement": 0.99},
)


@fewstep.register_teacher("stored-of-test-evaluation")
def stored():
    """A Gaussian with rows beside its weights, as the embedded teacher has."""
    made = fewstep.teachers.gaussian(fit_steps=2)
    card = replace(made.card, name="stored-of-test-evaluation")
    evaluation = replace(made.evaluation, rows=STORED, rows_protocol=made.evaluation.protocol_hash)
    return replace(made, card=card, options={}, evaluation=evaluation)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    options = {"iterations": 2, "batch_size": 4, "guidance": 1.0, "num_steps": 2, "train": {"device": "cpu"}}
    return fewstep.distill("stored-of-test-evaluation", out=tmp_path_factory.mktemp("eval") / "run", **options)


def rows_of(run, **options) -> list[dict]:
    evaluate_run(run.out, n=64, seed=9, device="cpu", **options)
    return json.loads((run.out / "eval.json").read_text())["rows"]


def test_rows_are_teacher_untrained_and_student_by_one_protocol(run):
    """Fails if a row is made with another seed, count, prompts or step count."""
    rows = rows_of(run, recompute_teacher=True)
    judge, prompts = run.teacher.evaluation, [""] * 64
    made = {
        "teacher": sample_teacher(run.teacher, 64, seed=9, num_steps=50),
        "untrained student": untrained_student(run.out, device="cpu").sample(64, seed=9),
        "student": run.student.sample(64, seed=9),
    }
    assert [row["model"] for row in rows] == list(made)
    assert [(row["steps"], row["n"], row["seed"]) for row in rows] == [(50, 64, 9), (2, 64, 9), (2, 64, 9)]
    for row in rows:
        expected = judge.measure(made[row["model"]], prompts)
        assert row["figures"].keys() == expected.keys()
        assert_close([*row["figures"].values()], [*expected.values()])


def test_stored_row_is_at_the_teachers_guidance_of_most_steps_and_samples(run):
    """Fails if the denominator of a claim is a row of fewer samples, or another guidance."""
    teacher = rows_of(run)[0]
    assert teacher["stored"] and (teacher["steps"], teacher["n"], teacher["guidance"]) == (50, 10_000, 1.0)
    assert teacher["figures"] == {"fmd": 4.5, "agreement": 0.97}


def test_the_untrained_student_can_be_left_out(run):
    assert [row["model"] for row in rows_of(run, untrained=False)] == ["teacher", "student"]


def test_stored_rows_of_another_protocol_are_not_used(run, monkeypatch, capsys):
    """Fails if the rows' hash is never compared: one table would hold figures that do not compare."""
    old = replace(run.teacher.evaluation, rows_protocol="older")
    teacher = replace(run.teacher, evaluation=old)
    monkeypatch.setattr("fewstep.students.load_teacher", lambda *_, **__: teacher)
    assert not rows_of(run)[0]["stored"]
    assert "protocol older, this evaluation is of closed form: measuring the teacher anew" in capsys.readouterr().err


def test_record_names_the_checkpoint(run):
    rows_of(run, which="last")
    record = json.loads((run.out / "eval.json").read_text())
    assert (record["which"], record["iteration"]) == ("last", 2)


def test_recomputed_teacher_says_with_which_guidance(run):
    teacher = rows_of(run, recompute_teacher=True)[0]
    assert not teacher["stored"] and teacher["guidance"] == run.teacher.guidance


def test_record_tells_protocol_and_both_environments(run):
    rows_of(run)
    record = json.loads((run.out / "eval.json").read_text())
    assert record["protocol_hash"] == "closed form"
    assert record["training"] == json.loads((run.out / "environment.json").read_text())
    assert record["environment"]["packages"]["torch"]


def test_default_seeds_were_used_neither_in_training_nor_to_choose_a_checkpoint():
    """Image i uses seed + i: 10,000 of them must not touch the preview's or the running figure's."""
    import inspect

    from fewstep.training.preview import PREVIEW_SEED

    seed = inspect.signature(evaluate_run).parameters["seed"].default
    assert seed > PREVIEW_SEED + 20_000 + 10_000


def test_table_leaves_out_what_a_row_lacks():
    rows = [
        Row("teacher", 50, 10_000, 0, {"fmd": 4.5678, "agreement": 0.97}, 2.0, stored=True),
        Row("student", 1, 2000, 0, {"fmd": 12.0, "sw": 0.5}),
    ]
    assert markdown(rows).splitlines() == [
        "| model | steps | CFG | samples | FMD | agreement | sw |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| teacher (stored) | 50 | 2 | 10000 | 4.568 | 0.97 | - |",
        "| student | 1 | - | 2000 | 12 | - | 0.5 |",
    ]


def test_seeds_give_means_and_deviations_of_disjoint_samples(run):
    """Set k of n samples starts at seed + k n.  Fails if the sets overlap: their spread would be too small."""
    table = evaluate_run(run.out, n=64, seed=9, seeds=3, device="cpu")
    row = json.loads((run.out / "eval.json").read_text())["rows"][-1]
    figures = [run.teacher.evaluation.measure(run.student.sample(64, seed=9 + 64 * k), [""] * 64) for k in range(3)]
    sw = torch.tensor([f["sw"] for f in figures], dtype=torch.float64)
    assert (row["figures"]["sw"], row["spread"]["sw"]) == pytest.approx((sw.mean().item(), sw.std().item()), rel=1e-4)
    assert row["seeds"] == 3 and "| 3 x 64 |" in table and f"± {sw.std():.2g}" in table
    with pytest.raises(ValueError, match="seeds must be >= 1"):
        evaluate_run(run.out, n=64, seeds=0, device="cpu")


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((4, 8, 8), (10, 4)), ((4, 64, 64), (10, 4)), ((4, 128, 128), (10, 1)), ((16, 128, 128), (4, 1)),
     ((16, 21, 60, 104), (2, 1))],
)  # fmt: skip
def test_previews_of_large_samples_hold_few(run, shape, grid):
    """The teacher makes each in fifty steps: fails if a preview of Wan would be forty videos."""
    teacher = replace(run.teacher, shape=shape, prompts=[f"prompt {i}" for i in range(12)], evaluation=None)
    preview = Preview(teacher, run.out, run.config.objective.sampler)
    prompts, each = preview._grid()
    assert (len(prompts), each) == grid and preview.prompts() == prompts


def test_the_figure_that_ranks_is_logged_first(run):
    """Fails if figures are logged as they come: advice and page would take another for it."""
    judge = replace(run.teacher.evaluation, measure=lambda x, prompts: {"precision": 0.9, "sw": 0.1}, metric="sw")
    preview = Preview(replace(run.teacher, evaluation=judge), run.out, run.config.objective.sampler, samples=8)
    figures = preview.evaluate(run.student.denoiser, 1)
    assert list(figures) == ["sw@8", "precision@8", "rank"] and figures["rank"] == 0.1


def test_final_tables_hold_every_figure_and_the_running_metric_does_not(run):
    """Fails if `full` is used at every evaluation of a training, or never."""
    judge = replace(run.teacher.evaluation, full=lambda x, prompts: {"everything": 1.0})
    teacher = replace(run.teacher, evaluation=judge)
    assert "everything" not in Preview(teacher, run.out, run.config.objective.sampler).evaluate(run.student.denoiser, 1)
    TEACHERS._entries["stored-of-test-evaluation"] = lambda: teacher
    try:
        assert rows_of(run)[-1]["figures"] == {"everything": 1.0}
    finally:
        TEACHERS._entries["stored-of-test-evaluation"] = stored
