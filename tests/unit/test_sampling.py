"""Image i is made by its number, whatever else is made beside it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from fewstep.diffusion import few_step
from fewstep.objectives.rollout import StudentSampler
from fewstep.sampling import NotFinite, Student, at_a_time, cycled, numbered_noise, sample_teacher
from fewstep.teachers import mixture
from fewstep.types import Condition

MEANS, COVS = [[1.0, -2.0], [0.0, 3.0], [4.0, 0.5]], [0.3, 0.2, 0.1]


@pytest.fixture(scope="module")
def teacher():
    """Three classes in the plane; the exact denoiser will do as a student's network."""
    return mixture(MEANS, COVS, classes=[0, 1, 2])


def student(teacher, **sampler) -> Student:
    return Student(teacher.denoiser, teacher, StudentSampler(**sampler))


MAKERS = {
    "one-step": lambda t, n, **k: student(t).sample(n, **k),
    "stochastic": lambda t, n, **k: student(t, num_steps=3).sample(n, **k),
    "deterministic": lambda t, n, **k: student(t, num_steps=3, stochastic=False).sample(n, **k),
    "teacher": lambda t, n, **k: sample_teacher(t, n, num_steps=3, **k),
}


@pytest.mark.parametrize(
    ("shape", "count"), [((2,), 250), ((4, 8, 8), 250), ((4, 64, 64), 4), ((4, 128, 128), 1), ((16, 21, 60, 104), 1)]
)
def test_large_samples_are_few_at_a_time(shape, count):
    """Fails if a preview of SDXL would be one batch of 40."""
    assert at_a_time(shape) == count


@pytest.mark.parametrize("maker", MAKERS)
def test_image_depends_on_neither_count_nor_batch_size(teacher, maker):
    """Fails if a batch shares one generator.  Rounding may differ with the batch, by a few units of 2^-23."""
    seven = MAKERS[maker](teacher, 7, seed=3)
    assert_close(MAKERS[maker](teacher, 7, seed=3, batch_size=2), seven, atol=1e-5, rtol=0)
    assert_close(MAKERS[maker](teacher, 4, seed=3), seven[:4], atol=1e-5, rtol=0)


@pytest.mark.parametrize("maker", MAKERS)
def test_image_i_uses_seed_plus_i(teacher, maker):
    prompts = ["class 1"]
    shifted = MAKERS[maker](teacher, 5, prompts=prompts, seed=12)
    assert_close(MAKERS[maker](teacher, 3, prompts=prompts, seed=14), shifted[2:], atol=1e-5, rtol=0)


def test_student_draws_latents_first_and_then_each_steps_noise(teacher):
    """diffusers' order.  Fails if step noise comes from another stream, or latents after it."""
    made = student(teacher, num_steps=2).sample(2, ["class 0"], seed=8)
    for i in range(2):
        generator = torch.Generator("cpu").manual_seed(8 + i)
        latents, noise = (torch.randn(1, 2, generator=generator) for _ in range(2))
        cond = Condition({"class": torch.tensor([0])})

        def denoise(x, t, cond=cond):
            return teacher.denoiser(x, t, cond).x0

        alone = few_step(
            denoise,
            latents,
            torch.tensor([1.0, 0.5]),
            teacher.denoiser.schedule,
            draw=lambda k, x, noise=noise: noise,
        )
        assert_close(made[i : i + 1], alone, atol=1e-5, rtol=0)


def test_student_samples_in_the_steps_it_was_trained_for_unless_told(teacher):
    trained = student(teacher, num_steps=4, stochastic=False)
    assert torch.equal(trained.sample(3), trained.sample(3, num_steps=4))
    assert not torch.equal(trained.sample(3), trained.sample(3, num_steps=2))
    assert torch.equal(trained.sample(3, num_steps=2), student(teacher, num_steps=2, stochastic=False).sample(3))


def test_student_uses_its_own_grid(teacher):
    """In whole thousandths.  Fails if the shift of the sampler's grid is lost between training and sampling."""
    seen = []

    def spy(x_t, t, cond, **_):
        seen.append(float(t[0]))
        return teacher.denoiser(x_t, t, cond)

    made = student(teacher, num_steps=4, shift=5.0)
    Student(_Spy(teacher.denoiser, spy), teacher, made.sampler).sample(1)
    assert_close(torch.tensor(seen), torch.tensor([1.0, 0.938, 0.833, 0.625]))


class _Spy(torch.nn.Module):
    def __init__(self, denoiser, call):
        super().__init__()
        self.schedule, self.backbone, self.call = denoiser.schedule, denoiser.backbone, call

    def forward(self, *arguments, **options):
        return self.call(*arguments, **options)


def test_a_student_that_starts_lower_gets_that_levels_noise():
    """On EDM sigma = 2.504, the table's nearest to 2.5.  Fails if training and sampling begin differently (80)."""
    teacher = mixture(MEANS, COVS, schedule="edm")
    seen = []

    def spy(x_t, t, cond, **_):
        seen.append(x_t)
        return teacher.denoiser(x_t, t, cond)

    denoiser = _Spy(teacher.denoiser, spy)
    for num_steps in (None, 3):
        Student(denoiser, teacher, StudentSampler(1, start=2.5)).sample(2, seed=4, num_steps=num_steps)
        eps = numbered_noise((2,), [torch.Generator().manual_seed(4 + i) for i in range(2)])
        assert_close(seen[0], 2.5 * eps, rtol=2e-3, atol=0)
        seen.clear()


def test_noise_enters_at_the_schedules_prior():
    """EDM starts at sigma 80; a Gaussian comes out as wide as the noise went in.  Fails if unit noise is fed there.

    Standard deviation 10 sqrt(80^2 / (80^2 + 10^2)) = 9.92; n = 1000 values: five standard errors are 1.1.
    """
    teacher = mixture([[0.0, 0.0]], [100.0], schedule="edm")
    assert abs(sample_teacher(teacher, 500, num_steps=20).std() - 9.92) < 1.1


def test_teachers_prompts_are_the_default_and_cycle(teacher):
    """Fails if prompts start anew in every batch."""
    made = student(teacher).sample(5, batch_size=2)
    assert_close(made, student(teacher).sample(5, ["class 0", "class 1", "class 2"]), atol=1e-5, rtol=0)
    alone = torch.cat([student(teacher).sample(1, [f"class {i % 3}"], seed=i) for i in range(5)])
    assert_close(made, alone, atol=1e-5, rtol=0)


def test_cycled_counts_from_the_first_image():
    assert cycled(["a", "b", "c"], 4, 8) == ["b", "c", "a", "b"]


def test_guidance_of_the_teacher_is_the_default(teacher):
    strong = replace(teacher, guidance=3.0)
    assert torch.equal(sample_teacher(strong, 3, num_steps=2), sample_teacher(teacher, 3, num_steps=2, guidance=3.0))
    assert not torch.equal(sample_teacher(strong, 3, num_steps=2), sample_teacher(teacher, 3, num_steps=2))


def test_progress_is_told_of_every_image(teacher):
    done = []
    student(teacher).sample(7, batch_size=3, progress=done.append)
    assert done == [3, 3, 1]


def test_numbered_noise_is_each_generators_own():
    generators = [torch.Generator().manual_seed(s) for s in (5, 9)]
    rows = [torch.randn(2, 3, generator=torch.Generator().manual_seed(s)) for s in (5, 9)]
    assert torch.equal(numbered_noise((2, 3), generators), torch.stack(rows))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be >= 1, got 0"),
        ({"n": 1, "num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"n": 1, "prompts": []}, r"prompts must be a list of one prompt or more.*got \[\]"),
        ({"n": 1, "prompts": "class 0"}, "prompts must be a list of one prompt or more.*got 'class 0'"),
    ],
)
def test_impossible_requests_are_refused(teacher, arguments, message):
    """A string would be taken for the list of its letters."""
    with pytest.raises(ValueError, match=message):
        student(teacher).sample(**arguments)


def test_samples_that_are_not_finite_are_refused(teacher):
    def broken(x_t, t, cond, **_):
        found = teacher.denoiser(x_t, t, cond)
        return replace(found, raw=torch.where(torch.arange(len(x_t))[:, None] == 1, torch.nan, found.raw))

    with pytest.raises(NotFinite, match="not finite"):
        Student(_Spy(teacher.denoiser, broken), teacher, StudentSampler()).sample(3)


def test_a_formula_samples_where_its_buffers_are(teacher):
    """It has no parameter to ask.  Fails if only parameters are: its states would be made on another device."""
    assert not list(teacher.denoiser.parameters())
    seen = []

    class Elsewhere(torch.nn.Module):
        schedule = teacher.denoiser.schedule

        def __init__(self):
            super().__init__()
            self.backbone = SimpleNamespace(extras=frozenset())
            self.register_buffer("means", torch.zeros(1, device="meta"))

        def forward(self, x_t, t, cond):
            seen.append(x_t.device.type)
            raise LookupError("far enough")

    with pytest.raises(LookupError, match="far enough"):
        Student(Elsewhere(), teacher, StudentSampler()).sample(1)
    assert seen == ["meta"]
