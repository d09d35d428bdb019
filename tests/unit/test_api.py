"""The Python way in."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import fewstep
from fewstep.api import default_out
from fewstep.students import untrained_student
from fewstep.training.preview import Preview

SHORT = {"iterations": 4, "batch_size": 4, "guidance": 1.0}
TRAIN = {"device": "cpu", "evaluate_every": 2, "checkpoint_every": 2, "generator": {"lr": 1e-2}}


def teacher():
    return fewstep.teachers.mixture(torch.tensor([[1.0, 0.0], [0.0, 3.0]]), [0.1, 0.2], schedule="vp", fit_steps=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose running figure grows, so that the first evaluated checkpoint, not the last, is the best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Preview, "evaluate", lambda self, student, iteration: {"rank": float(iteration)})
        out = tmp_path_factory.mktemp("api") / "run"
        return fewstep.distill(
            teacher(), out=out, num_steps=2, train=TRAIN, turns={"critic_per_generator": 1}, seed=5, **SHORT
        )


def weights(run, iteration: int) -> dict[str, torch.Tensor]:
    return load_file(run.out / "checkpoints" / f"{iteration:08d}" / "ema.safetensors")


def test_run_knows_its_folder_settings_and_counts(run):
    assert run.out.is_dir()
    assert (run.config.train.iterations, run.config.train.seed, run.config.objective.num_steps) == (4, 5, 2)
    assert (run.progress.iteration, run.progress.updates) == (4, {"generator": 4, "critic": 4})


@pytest.mark.parametrize(("which", "iteration"), [("best", 2), ("last", 4)])
def test_student_is_that_of_the_wanted_checkpoint(run, which, iteration):
    """Fails if the newest checkpoint is taken for the best."""
    student = fewstep.load_student(run.out, which=which, device="cpu")
    assert student.iteration == iteration
    assert_close(student.denoiser.backbone.module.state_dict(), weights(run, iteration), atol=0, rtol=0)
    assert not torch.equal(weights(run, 2)["inner.weight"], weights(run, 4)["inner.weight"])


def test_loaded_student_makes_the_runs_images(run):
    """The teacher is made again from config.yaml.  Fails if its options (means as tensors, schedule) are not saved."""
    again = fewstep.load_student(run.out, device="cpu")
    assert torch.equal(again.sample(5, seed=3), run.student.sample(5, seed=3))
    assert again.sampler.num_steps == 2


def test_untrained_student_is_where_training_starts(run):
    found = untrained_student(run.out, device="cpu").denoiser.backbone.module.state_dict()
    assert_close(found, dict(teacher().student().backbone.module.state_dict()), atol=0, rtol=0)


def test_sample_gives_images_on_the_cpu(run):
    images = run.student.sample(3, seed=1)
    assert (images.shape, images.dtype, images.device.type) == ((3, 2), torch.float32, "cpu")


def test_training_leaves_the_teacher_as_it_was(run):
    x, t = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)), torch.full((3,), 0.5)
    cond = run.teacher.encode([""] * 3)
    assert_close(run.teacher.denoiser(x, t, cond).x0, teacher().denoiser(x, t, cond).x0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidence": 2}, "method.guidence. Did you mean 'guidance'"),
        ({"num_steps": 0}, "num_steps must be >= 1"),
        ({"method": "dmmd2"}, "no method named 'dmmd2'. Did you mean 'dmd2'"),
        ({"train": {"lr": 1}}, "no setting train.lr"),
    ],
)
def test_wrong_option_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises((ValueError, LookupError), match=message):
        fewstep.distill("gaussian", out=tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_existing_run_is_gone_on_with_only_if_asked(run, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty"):
        fewstep.distill(teacher(), out=run.out, **SHORT)


def test_resumed_run_counts_on(tmp_path):
    options = {"out": tmp_path / "run", "train": TRAIN, "batch_size": 4, "guidance": 1.0}
    fewstep.distill(teacher(), iterations=2, **options)
    longer = fewstep.distill(teacher(), iterations=4, resume=True, **options)
    assert longer.progress.iteration == 4


def test_next_run_may_have_another_precision(run, tmp_path):
    """Fails if accelerate's state of the earlier run in this process is kept: it allows one precision and device."""
    options = {**SHORT, "iterations": 1, "train": {"device": "cpu", "precision": "bf16"}}
    assert fewstep.distill(teacher(), out=tmp_path / "run", **options).config.train.precision == "bf16"


def test_prompts_of_a_file_take_the_place_of_the_teachers(tmp_path):
    classes = fewstep.teachers.mixture([[1.0], [2.0]], [0.1, 0.1], classes=[0, 1], fit_steps=2)
    (tmp_path / "p.txt").write_text("class 7\n")
    with pytest.raises(ValueError, match=r"knows no prompt 'class 7'; allowed: 'class 0', 'class 1'"):
        fewstep.distill(classes, out=tmp_path / "run", prompts=str(tmp_path / "p.txt"), **SHORT)


def test_folder_without_a_checkpoint_is_named(run, tmp_path):
    (tmp_path / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(FileNotFoundError, match="no valid checkpoint in"):
        fewstep.load_student(tmp_path)


def test_default_folder_is_named_after_teacher_and_method():
    assert default_out("/some/where/tiny", "dmd2") == Path("runs/tiny-dmd2")


@pytest.mark.parametrize("name", fewstep.__all__)
def test_every_public_name_is_there(name):
    assert getattr(fewstep, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'destil'"):
        fewstep.destil  # noqa: B018
