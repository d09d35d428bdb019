"""A Stable Diffusion 3 pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch.testing import assert_close

from fewstep.sampling import sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, build_sd3

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")
LAYERS = {"sd3": {}, "sd3.5": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}


@pytest.fixture(scope="module", params=LAYERS)
def folder(request, tmp_path_factory):
    return build_sd3(tmp_path_factory.mktemp("sd3") / "pipeline", network=LAYERS[request.param], shift=3.0)


@pytest.fixture(scope="module")
def pipe(folder):
    made = StableDiffusion3Pipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "flow", "euler")
    assert (teacher.guidance, teacher.folder) == (7.0, folder)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(10, 2.5, None), (3, 1.0, None), (4, 2.0, 24)])
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4.  Fails with times before the shift, without the pooled text, without the VAE's shift."""
    teacher = load_teacher(str(folder), **({} if resolution is None else {"resolution": resolution}))
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        made = pipe(prompt, generator=generator, height=resolution, width=resolution, **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_encoder_is_the_pipelines(teacher, pipe):
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, None, None, device=CPU, negative_prompt="")
    assert set(found.tensors) == set(found.null) == {"text", "pooled"}
    assert_close(found.tensors["text"], text, atol=1e-5, rtol=0)
    assert_close(found.tensors["pooled"], pooled, atol=1e-5, rtol=0)
    assert_close(found.unconditional().tensors["text"], empty, atol=1e-5, rtol=0)
    assert_close(found.unconditional().tensors["pooled"], empty_pooled, atol=1e-5, rtol=0)


def test_conditions_of_a_plan_are_the_encoders(teacher, pipe):
    told = {name: tuple(value.shape[1:]) for name, value in teacher.encode(PROMPTS).tensors.items()}
    assert teacher.denoiser.backbone.conditions(pipe.tokenizer.model_max_length) == told


def test_taps_are_the_pictures_tokens(teacher):
    """A block returns the text's first, and the last block none of them."""
    taps = teacher.denoiser.backbone.taps
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=taps).taps
    assert taps[-1] == "transformer_blocks.1"
    assert {found[name].shape for name in taps} == {(2, 4, 32)}


def test_dynamic_shift_is_the_pipelines(tmp_path):
    folder = build_sd3(tmp_path / "dynamic", use_dynamic_shifting=True, max_shift=1.3)
    pipe = StableDiffusion3Pipeline.from_pretrained(folder)
    teacher = load_teacher(str(folder), resolution=32)
    pipe.set_progress_bar_config(disable=True)
    pipe("a bag", height=32, width=32, num_inference_steps=5, output_type="latent")
    assert_close(teacher.grid(5), pipe.scheduler.sigmas, atol=1e-6, rtol=0)


def test_latents_and_pictures_are_each_others(teacher, pipe):
    """The way back undoes the VAE's scale and shift, up to the VAE itself."""
    x = torch.randn(2, *LATENTS)
    with torch.no_grad():
        raw = pipe.vae.encode(teacher.codec.render(x)).latent_dist.mode()
    assert_close(teacher.codec.encode(teacher.codec.render(x)), (raw - 0.3) * 0.7, atol=1e-5, rtol=0)
