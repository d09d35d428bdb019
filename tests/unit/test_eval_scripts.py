"""The scripts beside the package: what they take from others' files, and what stands in the README."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fewstep
from eval import benchmark, compare_methods, memory, running, speed
from fewstep import cli
from fewstep.api import load_teacher
from fewstep.config import resolve


def event(ts: int, size: int, device: int = 0) -> dict:
    return {"name": "[memory]", "ts": ts, "args": {"Bytes": size, "Device Type": device}}


def test_peak_is_the_highest_running_sum_in_order_of_time_on_the_cpu():
    """Fails if events are summed in the order of the file, threads apart, or if a GPU's are added."""
    events = [event(5, -100), event(1, 100), event(3, 50), event(2, -100), event(4, 100), event(3, 1000, device=1)]
    assert memory.peak([*events, {"name": "aten::add", "ts": 0}]) == 150


def test_allocator_peak_holds_what_a_step_holds(tmp_path):
    """Fails if the events are not those of the training: a larger batch must show."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: {name: gaussian}\nmethod: {name: dmd2, guidance: 1.0}\ntrain: {batch_size: 4}\n")
    small = memory.allocated(recipe, [])
    large = memory.allocated(recipe, ["train.batch_size=4096"])
    assert 0 < small < large


@pytest.mark.parametrize("run", benchmark.RUNS, ids=lambda run: run.name)
def test_every_run_is_one_that_the_recipe_resolves_to(run):
    config = resolve(config=Path(run.recipe), given={}, sets=run.sets)
    assert (config.teacher, config.train.sharing) == (run.teacher, run.sharing)
    assert (config.objective.num_steps, bool(config.objective.gan_weight)) == (run.num_steps, run.gan)
    config.objective.sampler.grid(schedule_of(run.teacher))  # raises if it does not descend


@cache
def schedule_of(teacher):
    return load_teacher(teacher).denoiser.schedule


def test_runs_have_names_of_their_own():
    assert len({run.name for run in benchmark.RUNS}) == 24


def test_a_name_that_is_not_known_is_refused_with_those_that_are(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmark", "fashion-dit-copies-gan-3"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "allowed: fashion-dit-copies-plain-1" in capsys.readouterr().err


def test_the_table_of_the_readme_is_that_of_the_results():
    assert benchmark.table() in Path("README.md").read_text(encoding="utf-8")


def test_table_shows_the_teacher_once_and_a_missing_figure_as_a_dash(tmp_path, monkeypatch):
    """The teacher's row is its best of most steps and samples."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    rows = [{"steps": steps, "n": 10, "cfg": cfg, "fmd": fmd} for steps, cfg, fmd in ((50, 2, 1.3), (50, 1.5, 1.25))]
    stored = tmp_path / "fewstep" / "teachers" / "weights" / "fashion-dit" / "teacher.json"
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps({"rows": [{"steps": 4, "n": 10, "cfg": 1, "fmd": 1.0}, *rows]}))
    for run in benchmark.RUNS[:2]:
        student = {"figures": {"fmd": 1.5, "agreement": 0.9}, "spread": {"fmd": 0.02, "agreement": 0.0}}
        costs = {"minutes": 3.14, "cpu_minutes": 2.8, "memory_mib": {"allocated": 100, "resident": 900}}
        benchmark.result_of(run).write_text(json.dumps({"run": vars(run), "student": student, **costs}))
    assert benchmark.table().splitlines()[2:] == [
        "| fashion-dit, CFG 1.5 | - | - | 50 | 1.250 | - | - | - | - | - | - | - | - |",
        "|  | copies | no | 1 | 1.500 ± 0.020 | 0.900 | - | - | - | 3.1 | 2.8 | 100 | 900 |",
        "|  | copies | no | 2 | 1.500 ± 0.020 | 0.900 | - | - | - | 3.1 | 2.8 | 100 | 900 |",
    ]


def test_a_run_is_made_by_the_commands_of_a_user(tmp_path, monkeypatch):
    """Both are words that the command line takes; a folder with a run in it is resumed."""
    called = []
    monkeypatch.setattr(running, "child", lambda words, *_: called.append(words) or (3, 0.0))
    run = benchmark.RUNS[0]
    assert benchmark.make(run, tmp_path / run.name) == 3  # and no evaluation after a failed training
    (tmp_path / run.name / "config.yaml").write_text("")
    benchmark.make(run, tmp_path / run.name)
    assert len(called) == 2 and called[1] == [*called[0], "--resume"]
    assert CliRunner().invoke(cli.app, [*called[0], "--help"]).exit_code == 0


def test_a_child_is_timed_by_its_own_processor_time(tmp_path, monkeypatch):
    """Fails with the wall's time, and with that of all children: two runs at once would be counted twice."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nsleep 1\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(running.sys, "executable", str(script))
    with (tmp_path / "log").open("w") as log:
        code, seconds = running.child(["distill"], log)
    assert code == 3 and 0 <= seconds < 0.5


def test_the_processor_time_of_a_resumed_run_holds_that_of_its_first_part(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "child", lambda *_: (3, 60.0))
    for _ in range(2):
        benchmark.make(benchmark.RUNS[0], tmp_path / benchmark.RUNS[0].name)
    assert float((tmp_path / f"{benchmark.RUNS[0].name}.seconds").read_text()) == 120


@pytest.mark.parametrize("run", compare_methods.RUNS, ids=lambda run: run.name)
def test_every_compared_run_is_one_that_its_recipe_resolves_to(run):
    config = resolve(config=Path(run.recipe), sets=run.sets)
    assert (config.teacher, config.method) == (run.teacher, run.method)
    assert 1 <= compare_methods.nfe(config.objective) <= 4


def test_all_methods_are_compared_on_the_transformer():
    """Those of the package: other tests of this process may have registered theirs."""
    packaged = json.loads((Path(fewstep.__file__).parent / "index.json").read_text())["methods"]
    assert {run.method for run in compare_methods.RUNS if run.teacher == "fashion-dit"} == set(packaged)
    assert len({run.name for run in compare_methods.RUNS}) == len(compare_methods.RUNS)


def test_the_compared_methods_of_the_readme_are_those_of_the_results():
    """The table, and what it lacks."""
    text = Path("README.md").read_text(encoding="utf-8")
    assert compare_methods.table() in text
    missing = [run.name for run in compare_methods.RUNS if run.name not in compare_methods.results()]
    assert all(f"`{name}`" in text for name in missing)


def test_a_plan_fits_the_minutes_and_chooses_on_other_samples(tmp_path, monkeypatch):
    """2 s an iteration: 600 in 20 minutes, with eight looks at the student.  Another seed is not measured again."""
    costs = iter([{"seconds": 2.0, "forwards": 9.0}])
    monkeypatch.setattr(compare_methods.speed, "measure", lambda recipe, sets: next(costs))
    first = compare_methods.planned(run := compare_methods.RUNS[0], tmp_path, 20.0)
    plan = compare_methods.planned(replace(run, seed=1), tmp_path, 20.0)
    assert first["sets"][:-1] == plan["sets"][:-1] and first["sets"][-1] == "train.seed=0"
    assert set(plan["sets"]) >= {
        "train.seed=1",
        "train.iterations=600",
        "train.evaluate_every=75",
        "train.evaluate_samples=2000",
    }
    assert plan["networks"] == ["generator", "fake_score", "head"] and not plan["data_free"] and plan["nfe"] == 1


def test_the_newest_result_of_a_name_counts_and_names_its_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(compare_methods, "RESULTS", tmp_path / "compare.jsonl")
    assert compare_methods.results() == {}
    run = compare_methods.Run("fashion-dit", "sid")
    line = {
        "name": run.name,
        "data_free": True,
        "networks": ["generator", "fake_score"],
        "nfe": 1.0,
        "sets": ["train.iterations=800", "train.seed=0"],
        "iteration": 700,
        "cpu_minutes": 31.4,
        "seconds": 1.5,
        "forwards": 22.25,
        "memory_mib": {"allocated": 100, "resident": 900},
        "training": {"revision": "0123456789"},
        "date": "2026-11-24",
    }
    with (tmp_path / "compare.jsonl").open("w") as file:
        for fmd in (9.0, 2.5):
            student = {"figures": {"fmd": fmd, "recall": 0.5}, "spread": {"fmd": 0.02, "recall": 0.0}}
            file.write(json.dumps(line | {"student": student}) + "\n")
    (row,) = compare_methods.table().splitlines()[3:]
    assert row == (
        "|  | sid | yes | generator, fake score | 1 | 2.500 ± 0.020 | - | - | 0.500 | - | - | 700 of 800 | 1.50 | 22.2 "
        "| 31 | 100 | 900 | 0123456, 2026-11-24 |"
    )


def test_speed_counts_time_and_arithmetic_over_all_stages(tmp_path):
    """Of a two-stage method, and of one with four times the critic's turns, which costs more arithmetic."""
    recipe = tmp_path / "recipe.yaml"
    method = "{{name: phased_dmd, guidance: 1.0, num_steps: 2, turns: {{critic_per_generator: {n}}}}}"
    text = f"teacher: {{{{name: gaussian, fit_steps: 1}}}}\nmethod: {method}\ntrain: {{{{batch_size: 4}}}}\n"
    found = []
    for n in (1, 4):
        recipe.write_text(text.format(n=n))
        found.append(speed.here(recipe, []))
    assert all(cost["seconds"] > 0 for cost in found)
    assert found[1]["forwards"] < found[0]["forwards"]  # fewer of the generator's turns in an iteration


def test_arithmetic_is_in_calls_on_as_many_images_and_leaves_warm_up_out(tmp_path):
    """Fails if a method of small batches looks dear, or if SiD's first iteration, the critic alone, stands for all."""
    recipe, found = tmp_path / "recipe.yaml", {}
    for batch, warmup in ((4, 0), (8, 0), (4, 3)):
        method = f"{{name: sid, guidance: 1.0, turns: {{critic_warmup: {warmup}}}}}"
        recipe.write_text(
            f"teacher: {{name: gaussian, fit_steps: 1}}\nmethod: {method}\ntrain: {{batch_size: {batch}}}\n"
        )
        found[batch, warmup] = speed.here(recipe, [])["forwards"]
    assert found[8, 0] == pytest.approx(2 * found[4, 0])
    assert found[4, 3] == pytest.approx(found[4, 0])
