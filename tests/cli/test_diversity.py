"""`fewstep diversity`: how much a student's pictures of one prompt differ."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from fewstep import diversity
from fewstep.metrics.features import dequantise, quantise
from fewstep.models.perception import VggLpips
from fewstep.processes import Processes
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
    names = [(record["name"], record.get("folder"), record["iteration"]) for record in records]
    own = (pipeline_run.name, str(pipeline_run.resolve()), student.iteration)
    assert names == [(student.teacher.card.name, None, None), own]


@dataclass(frozen=True)
class Second(Processes):
    """The other one of two processes: its share, and what the main one says."""

    def gather(self, n, batch, make):
        return make(self.share(n, batch))

    def on_main(self, work, *arguments):
        return 7.0

    def main_first(self, work):
        return work()


def test_every_process_returns_the_main_ones_figure(pipeline_run, student, tmp_path):
    """Mutation: on the others it is the mean over the prompts of their own."""
    asked = {"prompts": ["a bag", "a coat"], "device": "cpu", "to": tmp_path / "lines.jsonl"}
    (record,) = diversity.measure_diversity(pipeline_run, 2, processes=Second(1, 2), **asked)
    assert record["figures"] == {"feature diversity": 7.0} and not (tmp_path / "lines.jsonl").exists()


def test_two_distances_do_not_share_a_hash(pipeline_run, tmp_path, monkeypatch):
    """VGGs of other weights, another torchmetrics, and another source's own.  Mutation: the figure's name alone."""

    def hash_of(distance, source="here"):
        def load(*arguments, **options):
            found = load_student(*arguments, **options)
            card = replace(found.teacher.card, source=source)
            return replace(found, teacher=replace(found.teacher, lpips=lambda: distance, card=card))

        monkeypatch.setattr(diversity, "load_student", load)
        (record,) = diversity.measure_diversity(pipeline_run, 2, prompts=["a bag"], device="cpu", to=tmp_path / "lines")
        assert record["distance"]
        return record["protocol_hash"]

    class Net(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([weight]))

        def forward(self, x, y):
            return apart(x, y)

    found = [hash_of(VggLpips(Net(w), version)) for w, version in ((1.0, "1"), (2.0, "1"), (1.0, "2"))]
    found += [hash_of(apart), hash_of(apart, "there")]
    assert len({*found}) == 5 and hash_of(VggLpips(Net(1.0), "1"), "there") == found[0]


def test_more_prompts_than_there_are_are_refused(cli, pipeline_run, student, tmp_path):
    (tmp_path / "prompts.txt").write_text("a bag\na bag\n")
    asked = ("-n", "2", "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    check_refused(cli("diversity", pipeline_run, *asked), "--n 2 prompts are asked for", "there are 1 different")
