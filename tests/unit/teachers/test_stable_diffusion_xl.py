"""A Stable Diffusion XL pipeline as a teacher does what the pipeline does by DDIM.  It is tiny and untrained."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch.testing import assert_close

from fewstep.sampling import sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, build_stable_diffusion_xl, tiny_unet

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[True, False], ids=["zeros", "empty prompt"])
def folder(request, tmp_path_factory):
    """Two conventions of what guidance leads away from."""
    return build_stable_diffusion_xl(tmp_path_factory.mktemp("xl") / "pipeline", zeros=request.param)


@pytest.fixture(scope="module")
def pipe(folder):
    made = StableDiffusionXLPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    made.scheduler = DDIMScheduler.from_config(made.scheduler.config, clip_sample=False, set_alpha_to_one=True)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "eps", "ddim")
    assert (teacher.guidance, teacher.folder) == (5.0, folder)


@pytest.mark.parametrize(("steps", "guidance"), [(10, 2.5), (4, 1.0)])
def test_teacher_samples_what_its_ddim_pipeline_samples(teacher, pipe, steps, guidance):
    """Images, < 1e-4.  Fails without the pooled text, or with another convention of the empty prompt."""
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "latent"}
        latents = pipe(prompt, generator=generator, **call).images
        with torch.no_grad():
            made = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0].clamp(-1, 1)
        assert_close(ours[i : i + 1], made, atol=1e-4, rtol=0)
        assert made.std() > 0.05


def test_encoder_is_the_pipelines(teacher, pipe):
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, empty, pooled, empty_pooled = pipe.encode_prompt(PROMPTS, device=CPU)
    assert set(found.tensors) == set(found.null) == {"text", "pooled"}
    for mine, theirs in zip((found, found.unconditional()), ((text, pooled), (empty, empty_pooled)), strict=True):
        assert_close(mine.tensors["text"], theirs[0], atol=1e-6, rtol=0)
        assert_close(mine.tensors["pooled"], theirs[1], atol=1e-6, rtol=0)
    zeros = pipe.config.force_zeros_for_empty_prompt
    assert bool(found.null["text"].any()) != zeros and bool(found.null["pooled"].any()) != zeros


def test_negative_prompt_replaces_the_empty_one(teacher, pipe):
    found = teacher.against("blurry").encode(PROMPTS)
    with torch.no_grad():
        _, negative, _, pooled = pipe.encode_prompt(PROMPTS, device=CPU, negative_prompt=["blurry"] * 2)
    assert_close(found.unconditional().tensors["text"], negative, atol=1e-6, rtol=0)
    assert_close(found.unconditional().tensors["pooled"], pooled, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(4, 4), (4, 8)])
def test_network_is_told_the_pictures_size(teacher, pipe, size):
    """In pixels, height first, uncropped, as the pipeline's own ids.  Mutation: width and height exchanged."""
    seen = []
    handle = teacher.denoiser.backbone.module.add_embedding.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs)
    )
    cond, x = teacher.encode(PROMPTS), torch.randn(2, LATENTS[0], *size)
    teacher.denoiser(x, torch.full((2,), 0.5), cond)
    handle.remove()
    pixels = tuple(side * pipe.vae_scale_factor for side in size)
    ids = pipe._get_add_time_ids(pixels, (0, 0), pixels, torch.float32, 16)
    wanted = pipe.unet.add_time_proj(ids.flatten()).reshape(1, -1).expand(2, -1)
    assert_close(seen[0][0], torch.cat([cond.tensors["pooled"], wanted], 1))


def test_unet_of_another_family_is_refused(pipe, tmp_path):
    """One that is not told the picture's size: its pipeline would fail at the first call."""
    parts = {**pipe.components, "unet": tiny_unet(32)}
    StableDiffusionXLPipeline(**parts).save_pretrained(tmp_path / "odd", safe_serialization=True)
    with pytest.raises(ValueError, match=r"addition_embed_type cannot be used here.*addition_embed_type 'text_time'"):
        load_teacher(str(tmp_path / "odd"))
