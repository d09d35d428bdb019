"""A Stable Diffusion pipeline as a teacher does what the pipeline does by DDIM.  The pipeline is tiny and untrained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.testing import assert_close

import fewstep
from fewstep.diffusion import VPTable, student_grid
from fewstep.sampling import sample_teacher
from fewstep.students import untrained_student
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, build_stable_diffusion

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
SCHEDULERS = {
    "leading": {},
    "trailing": {"timestep_spacing": "trailing"},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear"},
    "to-one": {"set_alpha_to_one": True},
    "pndm": {"scheduler": "PNDMScheduler", "skip_prk_steps": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(name) -> a pipeline folder with that scheduler; the same weights in all."""
    root = tmp_path_factory.mktemp("sd")

    def get(name: str) -> Path:
        folder = root / name
        return folder if folder.exists() else build_stable_diffusion(folder, **SCHEDULERS[name])

    return get


def pipeline(folder: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def made_by(pipe, prompt: str, seed: int, **call):
    """The pipeline's picture [1, C, H, W], not scaled to [0, 1]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    latents = pipe(prompt, generator=generator, output_type="latent", **call).images
    with torch.no_grad():
        return pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)


def test_folder_loads_as_a_teacher_of_its_shape(folders):
    teacher = load_teacher(str(folders("leading")))
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "eps", "ddim")
    assert isinstance(teacher.denoiser.schedule, VPTable)
    assert teacher.folder == folders("leading")


@pytest.mark.parametrize("name", ["leading", "trailing", "v", "sample", "zero-snr", "cosine", "linear"])
@pytest.mark.parametrize(("steps", "guidance"), [(10, 2.5), (4, 1.0)])
def test_teacher_samples_what_its_ddim_pipeline_samples(folders, name, steps, guidance):
    """Images, < 1e-4.  Fails if the last step goes on to x0, times are off by one index, or betas are another's."""
    teacher, pipe = load_teacher(str(folders(name))), pipeline(folders(name))
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    for i, prompt in enumerate(PROMPTS):
        made = made_by(pipe, prompt, 5 + i, num_inference_steps=steps, guidance_scale=guidance)
        assert_close(ours[i : i + 1], made, atol=1e-4, rtol=0)
        assert made.std() > 0.05  # an image that is all one grey would equal any other


def test_other_schedulers_are_sampled_by_ddim_at_their_times(folders):
    teacher, pipe = load_teacher(str(folders("pndm"))), pipeline(folders("pndm"))
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    ours = sample_teacher(teacher, 1, PROMPTS[:1], 5, num_steps=10, guidance=2.0)
    assert_close(ours, made_by(pipe, PROMPTS[0], 5, num_inference_steps=10, guidance_scale=2.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "steps", "first", "last"), [("leading", 50, 981, 1), ("trailing", 50, 999, 19), ("trailing", 4, 999, 249)]
)
def test_grid_is_the_schedulers_indices(folders, name, steps, first, last):
    """They reach the network as whole numbers."""
    teacher = load_teacher(str(folders(name)))
    grid = teacher.grid(steps)
    told = teacher.denoiser.backbone.network_time(grid)
    assert grid.shape == (steps + 1,) and 0 < grid[-1] < 1e-30
    assert torch.equal(told[:-1], told[:-1].round())
    assert (told[0], told[-2]) == (first, last)


def test_grid_ends_in_data_where_the_scheduler_says_so(folders):
    assert load_teacher(str(folders("to-one"))).grid(10)[-1] == 0


def test_too_many_steps_are_refused(folders):
    """With an offset of 1, a thousand steps would start at index 1000 of 0..999."""
    teacher = load_teacher(str(folders("leading")))
    with pytest.raises(ValueError, match="grid of 1000 steps starts beyond its last time; use 999 steps"):
        teacher.grid(1000)
    assert len(teacher.grid(999)) == 1000


def test_students_times_are_whole_for_the_network(folders):
    """DMD2's 999, 749, 499, 249."""
    teacher = load_teacher(str(folders("leading")))
    told = teacher.denoiser.backbone.network_time(student_grid(teacher.denoiser.schedule, 4))
    assert told.tolist() == [999, 749, 499, 249]


def test_encoder_is_the_pipelines(folders):
    teacher, pipe = load_teacher(str(folders("leading"))), pipeline(folders("leading"))
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, empty = pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    assert set(found.tensors) == set(found.null) == {"text"}
    assert_close(found.tensors["text"], text, atol=1e-6, rtol=0)
    assert_close(found.unconditional().tensors["text"], empty, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["leading", "v"])
def test_distillation_moves_the_student(folders, tmp_path, name):
    """Six iterations of DMD2 through the trainer, checkpoint and reload included."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    run = fewstep.distill(
        str(folders(name)),
        num_steps=4,
        iterations=6,
        batch_size=2,
        guidance=2.0,
        prompts=str(prompts),
        out=tmp_path / "run",
        train={"device": "cpu", "generator": {"lr": 1e-2}},
    )
    before = untrained_student(run.out, teacher=run.teacher)
    pairs = zip(run.student.denoiser.parameters(), before.denoiser.parameters(), strict=True)
    assert all(p.isfinite().all() for p in run.student.denoiser.parameters())
    assert max(float((p - q).abs().max()) for p, q in pairs) > 1e-3
    assert run.student.sample(2, PROMPTS, 3).shape == (2, 1, 16, 16)


def changed(folder: Path, to: Path, part: str, **settings) -> Path:
    copy = Path(shutil.copytree(folder, to))
    (path,) = (copy / part).glob("*config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return copy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr with prediction_type 'epsilon'"),
        ({"thresholding": True}, "thresholding cannot be used"),
        ({"prediction_type": "velocity"}, "prediction_type 'velocity' is unknown here; known: epsilon"),
    ],
)
def test_schedulers_that_cannot_be_used_are_named(folders, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(str(changed(folders("leading"), tmp_path / "teacher", "scheduler", **settings)))


def test_scheduler_without_betas_is_named(folders, tmp_path):
    copy = Path(shutil.copytree(folders("leading"), tmp_path / "teacher"))
    index = json.loads((copy / "model_index.json").read_text())
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index | {"scheduler": scheduler}))
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler has no betas"):
        load_teacher(str(copy))
