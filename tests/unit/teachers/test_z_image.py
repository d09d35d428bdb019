"""A Z-Image pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import ZImagePipeline
from torch.testing import assert_close

from fewstep.models.discriminator import taps_of
from fewstep.sampling import sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, PIXELS, build_z_image

PROMPTS = ["a bag", "an ankle boot, black and white, on a white floor, seen from the left, and a coat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_z_image(tmp_path_factory.mktemp("z_image") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet_pipeline(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder), resolution=PIXELS)


def quiet_pipeline(folder):
    made = ZImagePipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "flow", "euler")
    assert (teacher.guidance, teacher.folder) == (6.0, folder)
    assert load_teacher(str(folder)).shape == (LATENTS[0], 128, 128)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(8, 2.5, 16), (3, 1.0, 16), (4, 2.0, 24)])
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4, together where the pipeline makes them alone.

    Fails with time or output the other way, with guidance as the pipeline counts it, with another prompt's length.
    """
    teacher = load_teacher(str(folder), resolution=resolution)
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    call = {"num_inference_steps": steps, "guidance_scale": guidance - 1, "output_type": "pt"}
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        made = pipe(prompt, generator=generator, height=resolution, width=resolution, **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_encoder_is_the_pipelines(teacher, pipe):
    """Rows of their own lengths, up to the padding that the network never sees."""
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        texts, empty = pipe.encode_prompt(list(PROMPTS))
    lengths = found.tensors["length"].tolist()
    assert lengths == [len(text) for text in texts] and lengths[0] < 32 < lengths[1]
    assert found.null["length"].tolist() == [len(empty[0])]
    for row, text in zip(found.tensors["text"], texts, strict=True):
        assert_close(row[: len(text)], text, atol=1e-5, rtol=0)
    assert_close(found.null["text"][0, : len(empty[0])], empty[0], atol=1e-5, rtol=0)
    assert teacher.denoiser.backbone.conditions(16) == {"text": (512, 16)}


def test_padding_between_prompts_is_not_seen(teacher):
    """A short prompt beside a long one gives what it gives alone, and one call gives both."""
    cond, x = teacher.encode(PROMPTS), torch.randn(2, *LATENTS)
    t, seen = torch.tensor([0.3, 0.8]), []
    handle = teacher.denoiser.backbone.module.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        both = teacher.denoiser(x, t, cond).raw
        alone = [teacher.denoiser(x[i : i + 1], t[i : i + 1], teacher.encode([PROMPTS[i]])).raw for i in range(2)]
    handle.remove()
    assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
    assert len(seen) == 3


def test_taps_are_the_pictures_tokens(teacher):
    """Of prompts of different lengths, too: 4 of a picture, before 28 of padding and the text's."""
    taps = taps_of(teacher.denoiser, teacher.encode(PROMPTS))
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=taps).taps
    assert {name: value.shape for name, value in found.items()} == {"layers.1": (2, 4, 32)}


def test_time_and_flow_run_as_everywhere(teacher):
    """At t = 0 the network is told its own end, 1; along the flow x0 is x_t - t flow, its output is x0 - eps."""
    backbone, cond = teacher.denoiser.backbone, teacher.encode(PROMPTS[:1])
    assert backbone.network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1, 0.75, 0]
    x = torch.randn(1, *LATENTS)
    with torch.no_grad():
        text = cond.tensors["text"][0, : int(cond.tensors["length"]) if "length" in cond.tensors else None]
        theirs = backbone.module([x[0, :, None]], torch.tensor([0.75]), [text], return_dict=False)[0][0][:, 0]
        ours = teacher.denoiser(x, torch.tensor([0.25]), cond).x0
    assert_close(ours[0], x[0] + 0.25 * theirs, atol=1e-5, rtol=0)


def test_dynamic_shift_is_the_pipelines(tmp_path):
    settings = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 9, "max_shift": 1.3}
    folder = build_z_image(tmp_path / "dynamic", **settings)
    pipe, teacher = quiet_pipeline(folder), load_teacher(str(folder), resolution=24)
    pipe("a bag", height=24, width=24, num_inference_steps=5, output_type="latent")
    assert_close(teacher.grid(5), pipe.scheduler.sigmas, atol=1e-6, rtol=0)
