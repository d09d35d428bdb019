"""`fewstep eval --score`: figures by an adapter in another process, and what is refused before one starts.

Stand-ins of the packages themselves are in tests/unit/metrics/outside/test_adapters.py.
"""

import json
import shlex
import sys
import tempfile
from pathlib import Path

import pytest

from eval.make_tables import markdown, read, tables
from fewstep import scoring
from fewstep.metrics.features import file_sha256
from fewstep.metrics.outside.figures import STYLES, TASKS
from fewstep.metrics.outside.scores import SCORES
from fewstep.students import load_student
from tests.cli.test_bad_inputs import check_refused
from tests.cli.test_protocols import draw, lines

BRIGHTNESS = """
import json, os, sys
from PIL import Image
asked = json.load(sys.stdin)
scores = {}
for item in asked["items"]:
    image = Image.open(os.path.join(asked["folder"], item["file"])).convert("L")
    scores[item["file"]] = sum(image.getdata()) / (image.width * image.height) + len(item["prompt"])
    print(f"progress: {len(scores)}/{len(asked['items'])}", file=sys.stderr)
json.dump({"contract": 1, "metric": asked["metric"], "scores": scores, "seconds": 0.1,
           "package": "light " + asked["options"].get("unit", "1")}, sys.stdout)
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """In a folder: three pictures, their prompts, and an adapter of a user's own."""
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "images", 3, 0)
    (tmp_path / "three.txt").write_text("a cat\na dog\na cat\n")
    (tmp_path / "none.txt").write_text("")
    (tmp_path / "light.py").write_text(BRIGHTNESS)
    return tmp_path


LIGHT = ("--score", "./light.py", "--prompts", "three.txt", "--device", "cpu")


def test_a_folder_is_scored_and_written_down(cli, stage):
    """The mean by hand; a line holds what it depends on, and tables read it."""
    done = cli("eval", "images", *LIGHT)
    assert done.exit_code == 0, done.output
    (line,) = lines(stage / "images" / "figures.jsonl")
    answer = json.loads((stage / "images" / line["answer"]).read_text())
    assert line["figures"] == {"light": pytest.approx(sum(answer["scores"].values()) / 3)}
    assert "light: 0/3" in done.stderr and "95% interval" in done.stdout
    assert (line["name"], line["n"], line["scored"]["package"]) == ("images", 3, "light 1")
    assert len(line["scored"]["adapter"]) == 64 and line["intervals"]["light"][0] < line["figures"]["light"]
    (table,) = tables(read(stage / "images" / "figures.jsonl"))
    assert table.rows[0][:2] == ("images", "-") and "±" in table.rows[0][2]
    assert table.notes[0] == "3 samples; ± half of the 95% interval over prompts"
    assert "| model | NFE | light |" in markdown([table])


def test_what_changes_figures_changes_the_protocol(cli, stage):
    """Options, prompts, and the adapter itself. Mutation: a hash of the name alone."""
    (stage / "other.txt").write_text("a cat\na dog\na cow\n")
    assert cli("eval", "images", *LIGHT).exit_code == 0
    assert cli("eval", "images", *LIGHT, "--to", "new/again.jsonl").exit_code == 0
    assert cli("eval", "images", *LIGHT, "--option", "unit=2").exit_code == 0
    assert cli("eval", "images", *LIGHT[:2], "--prompts", "other.txt").exit_code == 0
    (stage / "light.py").write_text(BRIGHTNESS + "# brighter\n")
    assert cli("eval", "images", *LIGHT).exit_code == 0
    hashes = [line["protocol_hash"] for line in lines(stage / "images" / "figures.jsonl")]
    assert len(set(hashes)) == 4 and lines(stage / "new" / "again.jsonl")[0]["protocol_hash"] == hashes[0]
    assert len(tables(read(stage / "images" / "figures.jsonl"))) == 4


def test_an_adapter_called_like_a_score_of_ours_is_its_own(cli, stage):
    """Mutation: told by its name, it has the hash of ours, whatever it holds, and takes no option but ours."""
    asked, hashes = ("--score", "./imagereward.py", *LIGHT[2:], "--option", "unit=2"), []
    for more in ("", "# brighter\n"):
        (stage / "imagereward.py").write_text(BRIGHTNESS + more)
        done = cli("eval", "images", *asked)
        assert done.exit_code == 0, done.output
        line = lines(stage / "images" / "figures.jsonl")[-1]
        assert line["scored"]["adapter"] == file_sha256(stage / "imagereward.py")
        assert line["scored"]["options"] == {"unit": "2"}
        hashes.append(line["protocol_hash"])
    assert len(set(hashes)) == 2


def test_each_measurement_keeps_its_answer(cli, stage):
    """Two folders into one file.  Mutation: answers named by the score alone, of which the last is left."""
    draw(stage / "others", 3, 1)
    for folder in ("images", "others"):
        assert cli("eval", folder, *LIGHT, "--to", "all.jsonl").exit_code == 0
    answers = [json.loads((stage / line["answer"]).read_text())["scores"] for line in lines(stage / "all.jsonl")]
    means = [line["figures"]["light"] for line in lines(stage / "all.jsonl")]
    assert means == [pytest.approx(sum(scores.values()) / 3) for scores in answers] and means[0] != means[1]


def test_a_students_pictures_are_those_of_its_own_sampling(cli, pipeline_run, stage):
    """Picture i of prompt i by the noise numbered seed + i, written without loss; the tables know its steps."""
    from fewstep.metrics.features import quantise

    where = ("--to", stage / "lines.jsonl", "--seed", "7")
    done = cli("eval", pipeline_run, *LIGHT, *where)
    assert done.exit_code == 0, done.output
    (line,) = lines(stage / "lines.jsonl")
    prompts = ["a cat", "a dog", "a cat"]
    grey = quantise(load_student(pipeline_run, device="cpu").sample(3, prompts, 7))
    assert grey.shape[1] == 1
    assert line["figures"]["light"] == pytest.approx(float(grey.double().mean()) + len("a cat"))
    assert (line["seed"], line["steps"]) == (7, 1) and read(stage / "lines.jsonl")[0].steps == 1


def test_what_an_adapter_lacks_is_known_before_anything_is_sampled(cli, pipeline_run, stage, monkeypatch):
    """Mutation: it is first asked when thousands of pictures are there."""
    monkeypatch.setattr(scoring, "load_student", pytest.fail)
    (stage / "light.py").write_text("import nothing_such\n")
    check_refused(cli("eval", pipeline_run, *LIGHT, "--to", "all.jsonl"), "No module named 'nothing_such'")


def test_sampled_pictures_outlive_an_error(cli, pipeline_run, stage, monkeypatch):
    """Mended, the adapter scores those.  Mutation: a folder that goes with the error."""
    (stage / "pictures").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(stage / "pictures"))
    (stage / "light.py").write_text(BRIGHTNESS + "assert not scores, 'out of memory'\n")
    done = cli("eval", pipeline_run, *LIGHT, "--to", "all.jsonl")
    check_refused(done, "out of memory")
    (folder,) = (stage / "pictures").glob("fewstep-*")
    assert f"the 3 sampled pictures are kept: --images {folder} scores them" in done.stderr
    (stage / "light.py").write_text(BRIGHTNESS)
    assert cli("eval", pipeline_run, *LIGHT, "--to", "all.jsonl", "--images", folder).exit_code == 0
    assert cli("eval", pipeline_run, *LIGHT, "--to", "all.jsonl").exit_code == 0
    made, sampled = lines(stage / "all.jsonl")
    assert made["figures"] == sampled["figures"] and list((stage / "pictures").glob("fewstep-*")) == [folder]


def geneval(stage: Path, tasks=TASKS, correct=True) -> list[str]:
    """A folder of four pictures of a prompt of each task, and results that another machine wrote of them."""
    (stage / "prompts.jsonl").write_text("".join(json.dumps({"tag": t, "prompt": f"a {t}"}) + "\n" for t in tasks))
    rows = []
    for i, task in enumerate(tasks):
        draw(stage / "drawn" / f"{i:05}" / "samples", 4, i)
        for k in range(4):
            path = stage / "drawn" / f"{i:05}" / "samples" / f"{k:03}.png"
            path.rename(path.with_name(f"{k:04}.png"))
            rows.append({"filename": f"x/{i:05}/samples/{k:04}.png", "tag": task, "correct": correct and k < 3})
    (stage / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["eval", "drawn", "--score", "geneval", "--prompts", "prompts.jsonl", "--option", "results=results.jsonl"]


def test_a_benchmark_in_part_says_so(cli, stage):
    """24 of 2,212 pictures: measured, renamed, and not to be put beside published rows; the place is no setting."""
    done = cli(*geneval(stage))
    assert done.exit_code == 0, done.output
    (line,) = lines(stage / "drawn" / "figures.jsonl")
    assert line["figures"] == {"GenEval@24": 0.75} | {f"GenEval {task}@24": 0.75 for task in TASKS}
    assert "24 of the 2212 of GenEval: its figures are named GenEval@24" in done.stderr
    assert line["scored"]["options"] == {}
    (table,) = tables(read(stage / "drawn" / "figures.jsonl"))
    assert table.head[2] == "GenEval@24 ↑"


def test_an_answer_is_kept_when_nothing_can_be_made_of_it(cli, stage):
    """Hours of work: the figures are refused, the scores are there."""
    check_refused(cli(*geneval(stage, TASKS[:-1])), "mean of six tasks; no picture of color_attr")
    (kept,) = (stage / "drawn").glob("figures-geneval-*.json")
    assert len(json.loads(kept.read_text())["scores"]) == 20
    assert not (stage / "drawn" / "figures.jsonl").exists()


def test_hpsv2_takes_its_own_layout(cli, stage):
    """Names say which prompt a picture is of, and the styles have figures of their own."""
    (stage / "prompts").mkdir()
    for style in STYLES:
        (stage / "prompts" / f"{style}.json").write_text(json.dumps([f"{style} one", f"{style} two"]))
        draw(stage / "drawn" / style, 1, 0)
        (stage / "drawn" / style / "000.png").rename(stage / "drawn" / style / "00001.png")
    site = stage / "site"
    site.mkdir()
    (site / "torch.py").write_text(f"raise SystemExit({'hpsv2 was asked'!r})\n")
    (site / "huggingface_hub.py").write_text("")
    python = stage / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(site))} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    done = cli("eval", "drawn", "--score", "hpsv2.1", "--prompts", "prompts", "--python", python)
    check_refused(done, "hpsv2.1 in", "exited with code 1", "hpsv2 was asked", "pip install git+")
    assert "4 of the 3200 of HPSv2.1: its figures are named HPSv2.1@4" in done.stderr


GENEVAL = ("--score", "geneval", "--option", "results=results.jsonl")
REFUSALS = {
    "name": (["--score", "hpsv2"], ["no score named 'hpsv2'", "hpsv2.1, hpsv2.0", "FILE.py"]),
    "file": (["--score", "nowhere.py"], ["no adapter at nowhere.py"]),
    "python": (["--python", "nowhere/bin/python"], ["no Python at nowhere/bin/python", "bin/python"]),
    "option": (["--score", "imagereward", "--option", "size=3"], ["no option 'size'", "checkpoint: ImageReward.pt"]),
    "option-form": (["--option", "size"], ["--option 'size' should be KEY=VALUE"]),
    "option-twice": (["--option", "a=1", "--option", "a=2"], ["--option 'a=2' should be KEY=VALUE, each key once"]),
    "timeout": (["--timeout", "0"], ["--timeout 0 must be more than 0"]),
    "device": (["--device", "tpu"], ["device 'tpu'"]),
    "protocol": (["--protocol", "edm-fid50k"], ["--protocol goes without --score", "fewstep list scores"]),
    "reference": (["--reference", "x.npz"], ["--reference goes without --score"]),
    "n": (["-n", "4"], ["--n goes without --score"]),
    "seeds": (["--seeds", "2"], ["--seeds goes without --score"]),
    "teacher": (["--recompute-teacher"], ["--recompute-teacher", "without --protocol and --score"]),
    "images": (["--images", "nowhere"], ["nowhere"]),
    "videos": (["--score", "vbench"], ["reads its prompts from the videos' names; leave --prompts out"]),
    "tasks": ([*GENEVAL, "--prompts", "three.txt"], ["three.txt is no JSON"]),
    "no-prompt": ([*GENEVAL, "--prompts", "none.txt"], ["none.txt holds no prompt"]),
    "no-options": (GENEVAL[:2], ["geneval needs --option results=, or --option evaluator= and --option detector="]),
    "half-the-options": ([*GENEVAL[:2], "--option", "evaluator=x"], ["geneval needs --option results=, or"]),
    "no-styles": (["--score", "hpsv2.1", "--prompts", "images"], ["anime.json"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_scored_is_refused(cli, stage, case):
    """One message, before anything starts."""
    flags, words = REFUSALS[case]
    check_refused(cli("eval", "images", *LIGHT, *flags), *words)
    assert not (stage / "images" / "figures.jsonl").exists()


@pytest.mark.parametrize("flags", [("--seed", "7"), ("--which", "best"), ("--batch-size", "2")])
@pytest.mark.parametrize("asked", [LIGHT, ("--protocol", "edm-fid50k")], ids=["score", "protocol"])
@pytest.mark.parametrize("made", [(), ("--images", "images")], ids=["folder", "images"])
def test_what_says_how_to_sample_needs_a_student(cli, stage, toy_run, flags, asked, made):
    """Mutation: a setting without effect is taken, and a folder's figure is believed to be of that seed."""
    done = cli("eval", toy_run if made else "images", *asked, *made, *flags)
    check_refused(done, f"{flags[0]} goes with a run whose student is sampled")


def test_what_is_missing_is_told(cli, stage, toy_run):
    check_refused(cli("eval", "images", "--score", "imagereward"), "imagereward needs --prompts", "a line of a file")
    check_refused(cli("eval", "nowhere", *LIGHT), "no run or folder of images at nowhere")
    check_refused(cli("eval", "images", "--score", "vbench"), "no video in images")
    check_refused(cli("eval", toy_run, "--score", "vbench"), "is of videos, which are not sampled here")


@pytest.mark.parametrize("flag", ["--python", "--option", "--timeout"])
def test_flags_of_a_score_need_one(cli, stage, flag):
    """Mutation: a setting without effect is taken."""
    for more in ([], ["--protocol", "edm-fid50k"]):
        check_refused(cli("eval", "images", *more, flag, "1"), f"{flag} goes with --score NAME")


def test_scores_are_listed(cli):
    done = cli("list", "scores")
    assert done.exit_code == 0 and all(name in done.stdout.replace("\n", "") for name in SCORES)
