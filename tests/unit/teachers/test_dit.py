"""A DiT pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import DiTPipeline
from torch.testing import assert_close

from fewstep.config import resolve
from fewstep.diffusion import VPTable, student_grid
from fewstep.export import few_step_pipeline
from fewstep.export_adapter import write_adapter
from fewstep.models.adapters import LoRA
from fewstep.objectives.rollout import StudentSampler
from fewstep.sampling import Student, sample_teacher
from fewstep.teachers.outline import outline
from fewstep.teachers.pipelines import load_teacher
from fewstep.training.checks import check_brought
from tests.tiny_pipeline import LATENTS, build_dit

PROMPTS, LABELS = ["207", "Tinca tinca"], [207, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_dit(tmp_path_factory.mktemp("dit") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet_pipeline(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def quiet_pipeline(folder):
    made = DiTPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "eps", "ddim")
    assert (teacher.guidance, teacher.folder) == (4.0, folder)
    assert teacher.denoiser.schedule.alphas_cumprod == pytest.approx(VPTable.linear().alphas_cumprod, rel=1e-5)


@pytest.mark.parametrize(("steps", "guidance"), [(10, 2.5), (4, 1.0)])
def test_teacher_samples_what_its_pipeline_samples(teacher, pipe, steps, guidance):
    """Images, < 1e-4.  Fails with the variance's half of the output, another class for none, other betas."""
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    for i, label in enumerate(LABELS):
        call = {"generator": torch.Generator("cpu").manual_seed(5 + i), "output_type": "pt"}
        made = pipe([label], num_inference_steps=steps, guidance_scale=guidance, **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_a_prompt_is_a_class(teacher):
    """A number, a name, or nothing for none."""
    found = teacher.encode([" goldfish", "999", "", "Tinca tinca"])
    assert found.tensors["label"].tolist() == [1, 999, 1000, 0]
    assert found.unconditional().tensors["label"].tolist() == [1000] * 4
    assert teacher.denoiser.backbone.conditions(0) == {"label": tuple(found.tensors["label"].shape[1:])}


@pytest.mark.parametrize("prompt", ["a photo of a goldfish", "1000", "-1", "gold fish"])
def test_what_is_no_class_is_refused_with_what_is(teacher, prompt):
    with pytest.raises(ValueError, match=r"is no class of this teacher.* a number in 0\.\.999, or a class's name, as"):
        teacher.encode([prompt])


def test_own_prompts_are_all_classes_once(teacher):
    """Two of them have one name, which means the last of them."""
    assert teacher.encode(teacher.prompts).tensors["label"].tolist() == list(range(1000))
    assert teacher.prompts[1:5] == ("goldfish", "2", "crane", "4")


def test_no_class_is_taken_away_in_training(teacher):
    """Fails if the network drops labels in training, as diffusers' does, in 64 of which some would be."""
    network, cond = teacher.denoiser, teacher.encode(["207"] * 64)
    x, t = torch.randn(1, *LATENTS).expand(64, -1, -1, -1), torch.full((64,), 0.5)
    network.train()
    with torch.no_grad():
        raw = network(x, t, cond).raw
    network.eval()
    assert_close(raw, raw[:1].expand_as(raw), atol=1e-5, rtol=0)


def test_another_size_is_refused(folder):
    """Its pipeline makes no other."""
    with pytest.raises(ValueError, match="takes no resolution; allowed are none"):
        load_teacher(str(folder), resolution=32)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8])
def test_pipeline_of_a_student_makes_its_pictures(teacher, folder, steps, stochastic):
    """Of the undistilled network.  Its call takes neither times nor latents: its scheduler's own are the student's."""
    student = Student(teacher.denoiser, teacher, StudentSampler(num_steps=steps, stochastic=stochastic))
    ours = student.sample(1, ["crane"], 7)
    pipe, call = few_step_pipeline(student, folder, teacher.few_steps)
    pipe.set_progress_bar_config(disable=True)
    drawn = stochastic and steps > 1
    generator = None if drawn else torch.Generator("cpu").manual_seed(7)
    torch.manual_seed(7)
    made = pipe([3], generator=generator, output_type="pt", **call).images
    assert_close(2 * made - 1, ours, atol=1e-4, rtol=0)


def test_pipeline_of_a_student_keeps_the_names(teacher, folder, tmp_path):
    """Fails if they are left to diffusers, which saves none."""
    student = Student(teacher.denoiser, teacher, StudentSampler())
    pipe, _ = few_step_pipeline(student, folder, teacher.few_steps)
    pipe.save_pretrained(tmp_path / "student")
    assert DiTPipeline.from_pretrained(tmp_path / "student").labels == quiet_pipeline(folder).labels


@pytest.mark.parametrize(
    "student", [{"num_steps": 3}, {"first": 0.4}, {"start": 2.5}, {"num_steps": 4, "shift": 3.0}], ids=str
)
def test_student_of_other_times_is_refused(teacher, student):
    told = teacher.denoiser.backbone.network_time(StudentSampler(**student).grid(teacher.denoiser.schedule))
    with pytest.raises(ValueError, match="takes no times: its own are 1, 2, 4, 5, 8 or 10 equal steps from 999"):
        teacher.few_steps.tells(told)


def test_times_of_a_student_are_met_exactly(teacher):
    for steps in (1, 2, 4, 5, 8, 10):
        told = teacher.denoiser.backbone.network_time(student_grid(teacher.denoiser.schedule, steps))
        assert torch.equal(teacher.few_steps.tells(told), told.round())


def test_lora_file_is_refused(teacher, pipe, tmp_path):
    """The pipeline could not read it."""
    with pytest.raises(ValueError, match="a DiTPipeline reads no LoRA files; export the student as a pipeline"):
        write_adapter(pipe, teacher, {}, LoRA(), "transformer", tmp_path / "lora", "lora")


def test_no_prompts_are_asked_for_before_it_is_fetched():
    config = resolve(given={"teacher": {"name": "dit-xl-2-256"}, "method": {"name": "sid"}})
    check_brought(config, loaded=False)


def test_plan_needs_no_tokenizer(folder):
    """A folder of its configs has none."""
    assert outline(str(folder)).shape == LATENTS


def test_taps_are_the_pictures_tokens(teacher):
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=teacher.denoiser.backbone.taps).taps
    assert {name: value.shape for name, value in found.items()} == {"transformer_blocks.1": (2, 4, 32)}
