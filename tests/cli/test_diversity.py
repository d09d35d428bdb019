"""`fewstep diversity`: how much a student's pictures of one prompt differ."""

import json
from dataclasses import replace

import pytest
import torch

from fewstep import diversity
from fewstep.metrics.features import dequantise, quantise
from fewstep.sampling import sample_teacher
from fewstep.students import load_student
from tests.cli.test_bad_inputs import check_refused


def apart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Stands for LPIPS, whose VGG would have to be downloaded."""
    return (x - y).abs().flatten(1).mean(1)


@pytest.fixture
def student(pipeline_run, monkeypatch):
    """The tiny pipeline's, with that distance."""

    def load(*arguments, **options):
        found = load_student(*arguments, **options)
        return replace(found, teacher=replace(found.teacher, lpips=lambda: apart))

    monkeypatch.setattr(diversity, "load_student", load)
    return load(pipeline_run, device="cpu")


def test_figure_is_the_mean_over_pairs_of_each_prompt(cli, pipeline_run, student, tmp_path):
    """Picture j of prompt i has the noise numbered seed + 3 i + j; the teacher's are in 50 steps.

    Mutations: one noise for all prompts, the repeated prompt counted twice, float pictures in the place of bytes.
    """
    (tmp_path / "prompts.txt").write_text("a bag\na coat\na bag\n")
    asked = ("--per-prompt", "3", "--prompts", tmp_path / "prompts.txt", "--seed", "5", "--device", "cpu")
    done = cli("diversity", pipeline_run, *asked, "--with-teacher", "--to", tmp_path / "lines.jsonl")
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    makers = {"teacher": lambda *a: sample_teacher(student.teacher, *a, num_steps=50), "student": student.sample}
    assert [record["model"] for record in records] == list(makers)
    for record in records:
        values = []
        for i, prompt in enumerate(["a bag", "a coat"]):
            x = dequantise(quantise(makers[record["model"]](3, [prompt], 5 + 3 * i)))
            values += [float(apart(x[[a]], x[[b]])) for a, b in ((0, 1), (0, 2), (1, 2))]
        expected = sum(values) / 6
        assert record["figures"] == {"feature diversity": pytest.approx(expected, rel=1e-6)} and expected > 0
        assert (record["prompts"], record["per_prompt"], record["seed"]) == (2, 3, 5)
    assert "| student | 1 | 2 | 3 |" in done.stdout


def test_more_prompts_than_there_are_are_refused(cli, pipeline_run, student, tmp_path):
    (tmp_path / "prompts.txt").write_text("a bag\na bag\n")
    asked = ("-n", "2", "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    check_refused(cli("diversity", pipeline_run, *asked), "--n 2 prompts are asked for", "there are 1 different")
