"""A Flux pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import math

import pytest
import torch
from diffusers import FluxPipeline
from torch.testing import assert_close

from fewstep.diffusion import shift_time
from fewstep.export import few_step_pipeline, model_card
from fewstep.models.patches import pack, unpack
from fewstep.objectives.rollout import StudentSampler
from fewstep.sampling import Student, sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, PIXELS, build_flux

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")
KINDS = {"dev": {}, "schnell": {"network": {"guidance_embeds": False}, "use_dynamic_shifting": False}}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return build_flux(tmp_path_factory.mktemp(request.param) / "pipeline", **KINDS[request.param])


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    return build_flux(tmp_path_factory.mktemp("dev") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet_pipeline(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder), resolution=PIXELS)


def quiet_pipeline(folder):
    made = FluxPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "flow", "euler")
    assert (teacher.guidance, teacher.folder) == (1.0, folder)
    assert load_teacher(str(folder)).shape == (LATENTS[0], 128, 128)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(10, 1.0, 16), (3, 2.5, 16), (4, 1.0, 24)])
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4, with and without true guidance.  Fails with places, patches or times of another order."""
    teacher = load_teacher(str(folder), resolution=resolution)
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    call = {"num_inference_steps": steps, "true_cfg_scale": guidance, "negative_prompt": "", "output_type": "pt"}
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        made = pipe(prompt, generator=generator, height=resolution, width=resolution, **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_embedded_guidance_is_told_to_the_network(dev):
    teacher = load_teacher(str(dev), resolution=PIXELS, embedded_guidance=7.0)
    ours = sample_teacher(teacher, 1, PROMPTS, 5, num_steps=2)
    call = {"generator": torch.Generator("cpu").manual_seed(5), "height": PIXELS, "width": PIXELS}
    made = quiet_pipeline(dev)(PROMPTS[0], num_inference_steps=2, guidance_scale=7.0, output_type="pt", **call).images
    assert_close(ours, 2 * made - 1, atol=1e-4, rtol=0)
    other = sample_teacher(load_teacher(str(dev), resolution=PIXELS), 1, PROMPTS, 5, num_steps=2)
    assert (other - ours).abs().max() > 1e-3


def test_embedded_guidance_of_a_network_without_is_refused(tmp_path):
    schnell = build_flux(tmp_path / "schnell", **KINDS["schnell"])
    with pytest.raises(ValueError, match="no guidance embedded"):
        load_teacher(str(schnell), embedded_guidance=3.5)


def test_encoder_is_the_pipelines(teacher, pipe):
    found = teacher.encode(PROMPTS)
    for tensors, prompts in ((found.tensors, PROMPTS), (found.null, [""])):
        with torch.no_grad():
            text, pooled, _ = pipe.encode_prompt(prompts, device=CPU)
        assert set(tensors) == {"text", "pooled"}
        assert_close(tensors["text"], text, atol=1e-5, rtol=0)
        assert_close(tensors["pooled"], pooled, atol=1e-5, rtol=0)


def test_conditions_of_a_plan_are_the_encoders(teacher, pipe):
    told = {name: tuple(value.shape[1:]) for name, value in teacher.encode(PROMPTS).tensors.items()}
    assert teacher.denoiser.backbone.conditions(pipe.tokenizer.model_max_length) == told


def test_taps_are_the_pictures_tokens(teacher):
    """Of blocks of both kinds: the first half of these three, and the second."""
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    names = ("transformer_blocks.0", *teacher.denoiser.backbone.taps)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=names).taps
    assert names[1:] == ("single_transformer_blocks.0", "single_transformer_blocks.1")
    assert {found[name].shape for name in names} == {(2, 4, 32)}


def test_tokens_are_the_pipelines():
    """Of a picture that is not square, so that rows and columns cannot be exchanged."""
    x = torch.randn(3, 2, 6, 4)
    assert_close(pack(x), FluxPipeline._pack_latents(x, *x.shape), atol=0, rtol=0)
    assert_close(unpack(pack(x), (6, 4)), x, atol=0, rtol=0)


@pytest.mark.parametrize("stochastic", [False, True])
def test_card_makes_the_students_picture_from_a_lower_start(dev, stochastic):
    """The card's code hands tokens over; noise between steps is drawn as tokens.  Of the undistilled network."""
    teacher = load_teacher(str(dev), resolution=PIXELS, embedded_guidance=2.0)
    student = Student(teacher.denoiser, teacher, StudentSampler(num_steps=3, stochastic=stochastic, start=2.5))
    ours = student.sample(1, PROMPTS, 7)
    assert teacher.few_steps is not None
    pipe, call = few_step_pipeline(student, dev, teacher.few_steps)
    assert call["guidance_scale"] == 2.0
    loading = "from diffusers import DiffusionPipeline"
    code = model_card(student, call, dev, loading=loading).split("```python\n")[1].split("```")[0]
    names = {"pipe": pipe, "prompt": PROMPTS[0], "seed": 7}
    exec(code.replace(").images[0]", ", output_type='pt').images[0]"), names)
    assert_close(2 * names["image"] - 1, ours[0], atol=1e-4, rtol=0)


def test_dynamic_shift_is_the_pipelines(tmp_path):
    """Of nine tokens, the most, so that the shift is max_shift.  Fails with another count, or levels of another law."""
    folder = build_flux(tmp_path / "dynamic", base_image_seq_len=4, max_image_seq_len=9, max_shift=1.3)
    pipe, teacher = quiet_pipeline(folder), load_teacher(str(folder), resolution=24)
    pipe("a bag", height=24, width=24, num_inference_steps=5, output_type="latent")
    assert_close(teacher.grid(5), pipe.scheduler.sigmas, atol=1e-6, rtol=0)
    assert_close(teacher.grid(5)[1], shift_time(torch.tensor(0.8), math.exp(1.3)), atol=1e-6, rtol=0)


def test_latents_and_pictures_are_each_others(teacher, pipe):
    """The way back undoes the VAE's scale and shift, up to the VAE itself."""
    x = torch.randn(2, *LATENTS)
    with torch.no_grad():
        raw = pipe.vae.encode(teacher.codec.render(x)).latent_dist.mode()
    assert_close(teacher.codec.encode(teacher.codec.render(x)), (raw - 0.3) * 0.7, atol=1e-5, rtol=0)
