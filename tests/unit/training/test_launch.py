"""What a run starts from: its device, and the prompts that it keeps."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.training.launch import _accelerator
from fewstep.training.options import TrainConfig

OPTIONS = {"batch_size": 2, "guidance": 1.0, "train": {"device": "cpu"}}


def distill(folder: Path, iterations: int, *, prompts: Path | None = None, **options):
    teacher = fewstep.teachers.mixture([[1.0], [2.0]], [0.1, 0.1], classes=[0, 1], fit_steps=2)
    file = str(prompts or folder / "mine.txt")
    return fewstep.distill(teacher, iterations=iterations, out=folder / "run", prompts=file, **OPTIONS, **options)


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A folder with a run of one iteration on a prompt file."""
    (tmp_path / "mine.txt").write_text("class 1\n\n class 0\n")
    distill(tmp_path, 1)
    return tmp_path


@pytest.mark.skipif(torch.cuda.is_available(), reason="auto is cuda here")
def test_auto_never_picks_mps(monkeypatch):
    """Fails if the choice is left to accelerate, which takes mps where there is one."""
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda *_, **__: True)
    assert _accelerator(TrainConfig()).device.type == "cpu"


def test_prompts_are_copied_into_the_run(started):
    assert (started / "run" / "prompts.txt").read_text() == "class 1\nclass 0\n"


def test_run_goes_on_without_its_prompt_file(started):
    (started / "mine.txt").unlink()
    assert distill(started, 2, resume=True).progress.iteration == 2


def test_run_does_not_go_on_with_a_changed_prompt_file(started):
    """Fails if the copy is preferred: the user's change would be passed over in silence."""
    (started / "mine.txt").write_text("class 0\n")
    with pytest.raises(ValueError, match="was trained on other prompts"):
        distill(started, 2, resume=True)
    assert (started / "run" / "prompts.txt").read_text() == "class 1\nclass 0\n"


def test_misspelt_prompt_file_is_no_moved_one(started):
    with pytest.raises(FileNotFoundError, match=r"no prompt file at .*mime\.txt"):
        distill(started, 2, prompts=started / "mime.txt", resume=True)


def test_copy_goes_with_an_overwritten_run(started):
    teacher = fewstep.teachers.gaussian(fit_steps=2)
    fewstep.distill(teacher, iterations=1, out=started / "run", overwrite=True, **OPTIONS)
    assert not (started / "run" / "prompts.txt").exists()


@pytest.mark.parametrize(("method", "other"), [("sid", {"gan_warmup": 4}), ("dmd2", {"r1_weight": 1.0}), ("tmd", {})])
def test_a_gan_without_real_samples_is_refused(tmp_path, method, other):
    """Its advice is to leave the GAN off only where no real samples are needed then.  Fails if asking so trips over
    settings that another method has, or that have no effect without a GAN."""
    teacher = replace(fewstep.teachers.mixture([[1.0], [2.0]], [0.1, 0.1], classes=[0, 1], fit_steps=0), reals=None)
    with pytest.raises(ValueError, match="brings none; give --data FOLDER") as refused:
        fewstep.distill(teacher, method, iterations=1, out=tmp_path / "run", gan_weight=0.1, **OPTIONS, **other)
    assert ("--set method.gan_weight=0" in str(refused.value)) == (method != "tmd")


def test_derivatives_are_checked_before_autocast_is_on(tmp_path):
    """Fails, with "cannot be checked", where finite differences are taken in bf16.

    The derivative itself is sound there: `g/jvp`, its size, is within 2% of float32's.
    """
    sizes = []
    for precision in ("fp32", "bf16"):
        train = {"device": "cpu", "precision": precision, "batch_size": 2, "log_every": 1, "evaluate_samples": 10}
        fewstep.distill("fashion-dit", "tbcm", iterations=1, out=tmp_path / precision, train=train)
        first = json.loads((tmp_path / precision / "metrics.jsonl").read_text().splitlines()[0])
        sizes.append(first["g/jvp"])
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02)
    assert sizes[1] != sizes[0]
