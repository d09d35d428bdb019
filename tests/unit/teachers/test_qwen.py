"""A Qwen-Image pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import QwenImagePipeline
from torch.testing import assert_close

from fewstep.diffusion import guided
from fewstep.export import few_step_pipeline, model_card
from fewstep.objectives.rollout import StudentSampler
from fewstep.sampling import Student, sample_teacher
from fewstep.teachers.pipelines import load_teacher
from fewstep.types import Condition
from tests.tiny_pipeline import LATENTS, PIXELS, build_qwen

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_qwen(tmp_path_factory.mktemp("qwen") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    made = QwenImagePipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder), resolution=PIXELS)


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "flow", "euler")
    assert (teacher.guidance, teacher.folder) == (4.0, folder)
    assert load_teacher(str(folder)).shape == (LATENTS[0], 128, 128)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(10, 2.5, 16), (3, 1.0, 16), (4, 4.0, 24)])
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4, of prompts of several lengths together.  Fails if guided outputs are not given the length of
    those with the prompt, with lengths of whole pictures, without the mask, or without the VAE's moments."""
    teacher = load_teacher(str(folder), resolution=resolution)
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    call = {"num_inference_steps": steps, "true_cfg_scale": guidance, "negative_prompt": "", "output_type": "pt"}
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        made = pipe(prompt, generator=generator, height=resolution, width=resolution, **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_guided_patches_are_as_long_as_those_with_the_prompt(teacher):
    """And point where plain guidance does.  Each patch: 4 channels of 2x2."""
    x, t, cond = torch.randn(2, *LATENTS), torch.tensor([0.9, 0.3]), teacher.encode(PROMPTS)
    with torch.no_grad():
        c, u = teacher.denoiser(x, t, cond).raw, teacher.denoiser(x, t, cond.unconditional()).raw
        found = guided(teacher.denoiser, 3.0)(x, t, cond).raw
    for i in (0, 2):
        for j in (0, 2):
            patch = (slice(None), slice(None), slice(i, i + 2), slice(j, j + 2))
            plain = (u + 3 * (c - u))[patch].flatten(1)
            assert_close(found[patch].flatten(1).norm(dim=1), c[patch].flatten(1).norm(dim=1))
            assert_close(torch.cosine_similarity(found[patch].flatten(1), plain), torch.ones(2))


def test_guidance_of_nothing_is_nothing(teacher):
    """Not 0 / 0."""
    zero = torch.zeros(1, *LATENTS)
    assert torch.equal(teacher.denoiser.backbone.guide(zero, zero, 3.0), zero)


def test_row_of_a_mixed_batch_is_what_it_is_alone(teacher):
    """Values and gradients.  Fails if padding is attended to."""
    x, t = torch.randn(2, *LATENTS, requires_grad=True), torch.tensor([0.9, 0.3])
    cond = teacher.encode(PROMPTS)
    mixed = teacher.denoiser(x, t, cond).raw
    alone = torch.cat(
        [teacher.denoiser(x[i : i + 1], t[i : i + 1], teacher.encode([p])).raw for i, p in enumerate(PROMPTS)]
    )
    assert "length" in cond.tensors
    assert_close(mixed, alone, atol=1e-5, rtol=0)
    (found,), (wanted,) = (torch.autograd.grad(raw.square().sum(), x, retain_graph=True) for raw in (mixed, alone))
    assert_close(found, wanted, atol=1e-5, rtol=0)
    padded = teacher.denoiser(x, t, Condition({"text": cond.tensors["text"]})).raw
    assert (padded - alone).abs().max() > 1e-4  # else any length would do


def test_encoder_is_the_pipelines(teacher, pipe):
    found = teacher.encode(PROMPTS)
    lengths = found.tensors["length"].tolist()
    with torch.no_grad():
        for prompt, text, length in zip(
            [*PROMPTS, ""],
            [*found.tensors["text"], found.null["text"][0]],
            [*lengths, int(found.null["length"])],
            strict=True,
        ):
            wanted, mask = pipe.encode_prompt([prompt], device=CPU)
            assert mask is None and len(wanted[0]) == length
            assert_close(text[:length], wanted[0], atol=1e-5, rtol=0)


def test_conditions_of_a_plan_are_the_longest_prompts(teacher):
    """Cut to 512 tokens."""
    told = teacher.encode(["a photo of a bag " * 300])
    assert teacher.denoiser.backbone.conditions(16) == {"text": tuple(told.tensors["text"].shape[1:])}


def test_taps_are_the_pictures_tokens(teacher):
    """A block returns the text's first."""
    taps = teacher.denoiser.backbone.taps
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=taps).taps
    assert taps[-1] == "transformer_blocks.1"
    assert {found[name].shape for name in taps} == {(2, 4, 32)}


@pytest.mark.parametrize("terminal", [None, 0.02])
def test_dynamic_shift_is_the_pipelines(tmp_path, terminal):
    """Stretched to end at the terminal level, where there is one."""
    folder = build_qwen(tmp_path / "dynamic", base_image_seq_len=4, max_image_seq_len=9, shift_terminal=terminal)
    pipe, teacher = QwenImagePipeline.from_pretrained(folder), load_teacher(str(folder), resolution=24)
    pipe.set_progress_bar_config(disable=True)
    pipe("a bag", height=24, width=24, num_inference_steps=5, true_cfg_scale=1.0, output_type="latent")
    assert_close(teacher.grid(5), pipe.scheduler.sigmas, atol=1e-6, rtol=0)
    assert_close(float(teacher.grid(5)[-2]), terminal or float(pipe.scheduler.sigmas[-2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_card_makes_the_students_picture_from_a_lower_start(folder, teacher, stochastic):
    """The card's code hands tokens over; noise between steps is drawn as tokens.  Of the undistilled network."""
    student = Student(teacher.denoiser, teacher, StudentSampler(num_steps=3, stochastic=stochastic, start=2.5))
    ours = student.sample(1, PROMPTS, 7)
    assert teacher.few_steps is not None
    pipe, call = few_step_pipeline(student, folder, teacher.few_steps)
    loading = "from diffusers import DiffusionPipeline"
    code = model_card(student, call, folder, loading=loading).split("```python\n")[1].split("```")[0]
    names = {"pipe": pipe, "prompt": PROMPTS[0], "seed": 7}
    exec(code.replace(").images[0]", ", output_type='pt').images[0]"), names)
    assert_close(2 * names["image"] - 1, ours[0], atol=1e-4, rtol=0)


def test_latents_and_pictures_are_each_others(teacher, pipe):
    """The way back undoes the VAE's moments, up to the VAE itself."""
    x = torch.randn(2, *LATENTS)
    images = teacher.codec.render(x)
    with torch.no_grad():
        raw = pipe.vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0]
    mean, std = (
        torch.tensor(each).view(1, -1, 1, 1) for each in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    assert_close(teacher.codec.encode(images), (raw - mean) / std, atol=1e-5, rtol=0)
    assert images.shape == (2, *teacher.codec.image_shape(LATENTS)) == (2, 3, PIXELS, PIXELS)
