"""A run that starts from another run's student."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import fewstep
from fewstep.api import Run
from fewstep.config import resolve
from fewstep.training.launch import prepare

QUIET = {"evaluate_every": 1000, "checkpoint_every": 1000, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher():
    return fewstep.teachers.mixture(fit_steps=5)


@pytest.fixture(scope="module")
def first(teacher, tmp_path_factory) -> Run:
    out = tmp_path_factory.mktemp("start") / "first"
    return fewstep.distill(teacher, "dmd2", iterations=3, batch_size=4, out=out, guidance=1.0, train=QUIET)


def prepared(teacher, out: Path, student: Any, method: str = "swiftbrush", sharing: str = "copies", **options: Any):
    given = {
        "teacher": {"name": "mixture", **teacher.options},
        "method": {"name": method, "guidance": 1.0, **options},
        "train": {"iterations": 2, "batch_size": 4, "sharing": sharing, **QUIET},
        "student": str(student),
    }
    return prepare(resolve(given=given), out, lambda: teacher)[0]


@pytest.mark.parametrize("sharing", ["copies", "lora-fake"])
def test_the_generator_and_its_average_start_from_the_student_and_the_fake_score_from_the_teacher(
    teacher, first, run_folder, sharing
):
    """Fails if a later student is thrown away by the teacher's weights, or if the fake score starts from it, too."""
    trainer = prepared(teacher, run_folder, first.out, sharing=sharing)
    x, t, cond = torch.randn(3, 2), torch.ones(3), trainer.data.batch((0, 1, 2)).cond
    assert_close(trainer.trio.generator(x, t, cond).x0, first.student.denoiser(x, t, cond).x0)
    assert_close(trainer.ema.denoiser(x, t, cond).x0, first.student.denoiser(x, t, cond).x0)
    assert_close(trainer.trio.critic()(x, t, cond).x0, teacher.student()(x, t, cond).x0)
    assert not torch.equal(trainer.trio.generator(x, t, cond).x0, teacher.student()(x, t, cond).x0)


def test_a_student_with_parts_of_its_own_starts_from_it_too(teacher, first, run_folder):
    """Phased DMD's experts and BOOT's second time are built around the copies."""
    for method, options in (("boot", {}), ("phased_dmd", {"num_steps": 2})):
        trainer = prepared(teacher, run_folder / method, first.out, method, **options)
        x, t = torch.randn(3, 2), torch.ones(3)
        cond = trainer.data.batch((0, 1, 2)).cond.also(until=torch.zeros(3))
        made = trainer.trio.generator(x, t, cond).x0
        assert_close(made, first.student.denoiser(x, t, trainer.data.batch((0, 1, 2)).cond).x0)


def test_a_resumed_run_asks_for_the_student_no_more(teacher, first, run_folder, tmp_path):
    moved = tmp_path / "moved"
    first.out.rename(moved)
    try:
        run: dict[str, Any] = {
            "student": str(moved),
            "batch_size": 4,
            "out": run_folder,
            "guidance": 1.0,
            "train": QUIET,
        }
        fewstep.distill(teacher, "swiftbrush", iterations=2, **run)
    finally:
        moved.rename(first.out)
    assert fewstep.distill(teacher, "swiftbrush", iterations=3, resume=True, **run).progress.iteration == 3


def test_what_cannot_start_is_refused_with_the_remedy(teacher, first, run_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="--student takes a run's folder"):
        prepared(teacher, run_folder, tmp_path / "none")
    with pytest.raises(ValueError, match="take --sharing lora-fake or copies"):
        prepared(teacher, run_folder, first.out, sharing="lora")
    given = {"teacher": {"name": "gaussian"}, "method": {"name": "dmd2"}, "student": str(first.out)}
    with pytest.raises(ValueError, match="both must be the same"):
        prepare(resolve(given=given), run_folder, lambda: pytest.fail("weights were read"))
