"""A CogView4 pipeline as a teacher does what the pipeline does.  The pipeline is tiny and untrained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogView4Pipeline
from torch.testing import assert_close

from fewstep.sampling import sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import build

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
MIXED = ["a coat, black and white, " * 5, "a photo of a bag", "a coat, " * 6]  # 48, 16 and 32 tokens
SCHEDULERS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "base_image_seq_len": 4, "base_shift": 0.5},
    "exponential": {"use_dynamic_shifting": True, "base_image_seq_len": 4, "base_shift": 0.5, "max_shift": 0.5},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipeline folders by what their scheduler does; the same weights in all."""
    root = tmp_path_factory.mktemp("pipelines")
    return {name: build(root / name, **settings) for name, settings in SCHEDULERS.items()}


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """A pipeline whose prompts may take 48 tokens."""
    return build(tmp_path_factory.mktemp("long") / "pipeline", max_tokens=48)


def pipeline(folder: Path) -> CogView4Pipeline:
    pipe = CogView4Pipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_network_is_told_times_from_0_to_1000(teacher):
    """Fails if the network's time is t, or 0..999."""
    assert_close(
        teacher.denoiser.backbone.network_time(torch.tensor([0.0, 0.25, 1.0])), torch.tensor([0.0, 250.0, 1000.0])
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("steps", "guidance"), [(7, 2.5), (3, 1.0)])
def test_teacher_samples_what_its_pipeline_samples(folders, scheduler, steps, guidance):
    """Latents and images, < 1e-4.  Fails if the network is told the shifted time: its scheduler shifts the noise level
    only (seen with "shift", "linear" and "exponential")."""
    teacher, pipe = load_teacher(str(folders[scheduler])), pipeline(folders[scheduler])
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    for i, prompt in enumerate(PROMPTS):
        made = pipe(
            prompt,
            generator=torch.Generator("cpu").manual_seed(5 + i),
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=pipe.tokenizer.model_max_length,
            output_type="latent",
        ).images
        decoded = pipe.vae.decode(made / pipe.vae.config.scaling_factor, return_dict=False)[0].detach()
        assert_close(teacher.codec.decode(made), decoded.clamp(-1, 1), atol=1e-6, rtol=0)
        assert_close(ours[i : i + 1], decoded.clamp(-1, 1), atol=1e-4, rtol=0)
        assert decoded.std() > 0.05  # an image that is all one grey would equal any other


def test_latents_are_those_of_the_pipeline(teacher, folder):
    class Bare:
        def decode(self, x):
            return x

    ours = sample_teacher(replace(teacher, codec=Bare()), 1, PROMPTS[:1], 3, num_steps=5, guidance=2.0)
    made = pipeline(folder)(
        PROMPTS[0],
        generator=torch.Generator("cpu").manual_seed(3),
        num_inference_steps=5,
        guidance_scale=2.0,
        max_sequence_length=16,
        output_type="latent",
    ).images
    assert_close(ours, made, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_grid_is_the_pipelines_whole_timesteps(teacher, steps):
    grid = teacher.grid(steps)
    assert grid.shape == (steps + 1,)
    assert grid[0] == 1 and grid[-1] == 0
    assert_close(grid * 1000, (grid * 1000).round(), atol=1e-3, rtol=0)


def test_prompts_of_mixed_lengths_make_what_each_makes_alone(long_folder):
    """Fails if shorter prompts are given to the network with their padding, or rows come back in another order."""
    teacher, pipe = load_teacher(str(long_folder)), pipeline(long_folder)
    ours = sample_teacher(teacher, 3, MIXED, 5, num_steps=3, guidance=2.0)
    for i, prompt in enumerate(MIXED):
        made = pipe(
            prompt,
            generator=torch.Generator("cpu").manual_seed(5 + i),
            num_inference_steps=3,
            guidance_scale=2.0,
            max_sequence_length=48,
            output_type="latent",
        ).images
        assert_close(ours[i : i + 1], teacher.codec.decode(made), atol=1e-4, rtol=0)
