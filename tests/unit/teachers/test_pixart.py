"""A PixArt-Sigma pipeline as a teacher does what the pipeline does by DDIM.  It is tiny and untrained."""

import json
import shutil

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch.testing import assert_close

from fewstep.export_adapter import write_adapter
from fewstep.models.adapters import LoRA
from fewstep.sampling import sample_teacher
from fewstep.teachers.outline import outline
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, PIXELS, build_pixart

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")
PLAIN = {"use_resolution_binning": False, "clean_caption": False, "output_type": "pt"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_pixart(tmp_path_factory.mktemp("pixart") / "pipeline")


@pytest.fixture(scope="module")
def pipe(folder):
    return quiet_pipeline(folder)


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def quiet_pipeline(folder):
    made = PixArtSigmaPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "eps", "ddim")
    assert (teacher.guidance, teacher.folder) == (4.5, folder)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(10, 2.5, None), (4, 1.0, None), (4, 2.0, 24)])
def test_teacher_samples_what_its_ddim_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4.  Fails without the mask, with the variance's half of the channels, or with other betas."""
    teacher = load_teacher(str(folder), **({} if resolution is None else {"resolution": resolution}))
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    side = resolution or PIXELS
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "height": side, "width": side, **PLAIN}
    for i, prompt in enumerate(PROMPTS):
        made = pipe(prompt, generator=torch.Generator("cpu").manual_seed(5 + i), **call).images
        assert_close(ours[i : i + 1], 2 * made - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_published_scheduler_is_sampled_by_ddim_at_its_spacing(tmp_path):
    """DPM-Solver++ of second order, "linspace": four calls, the last at index 0; of first order it is DDIM."""
    folder = build_pixart(tmp_path / "dpm", name="DPMSolverMultistepScheduler")
    teacher, pipe = load_teacher(str(folder)), quiet_pipeline(folder)
    told = teacher.denoiser.backbone.network_time(teacher.grid(4))
    assert told.tolist() == [999, 666, 333, 0]
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=1)
    call = {"timesteps": [999, 666, 333, 0], "guidance_scale": 2.0, "height": PIXELS, "width": PIXELS, **PLAIN}
    made = pipe(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(5), **call).images
    assert_close(sample_teacher(teacher, 1, PROMPTS, 5, num_steps=4, guidance=2.0), 2 * made - 1, atol=1e-4, rtol=0)


def test_published_name_of_its_class_is_understood(folder, teacher, tmp_path):
    """The published configs still call the network a Transformer2DModel, and hold settings that are no longer read."""
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    index, config = old / "model_index.json", old / "transformer" / "config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"transformer": ["diffusers", "Transformer2DModel"]}))
    more = {"_class_name": "Transformer2DModel", "double_self_attention": False, "num_vector_embeds": None}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    found = sample_teacher(load_teacher(str(old)), 1, PROMPTS, 5, num_steps=2)
    assert_close(found, sample_teacher(teacher, 1, PROMPTS, 5, num_steps=2), atol=0, rtol=0)
    assert type(outline(str(old)).denoiser.backbone.module) is PixArtTransformer2DModel


def test_network_without_learned_variance_is_taken_whole(tmp_path):
    folder = build_pixart(tmp_path / "mean", network={"out_channels": LATENTS[0]})
    ours = sample_teacher(load_teacher(str(folder)), 1, PROMPTS, 5, num_steps=4, guidance=2.0)
    call = {"num_inference_steps": 4, "guidance_scale": 2.0, "height": PIXELS, "width": PIXELS, **PLAIN}
    made = quiet_pipeline(folder)(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(5), **call).images
    assert_close(ours, 2 * made - 1, atol=1e-4, rtol=0)


def test_network_that_is_told_sizes_is_refused(tmp_path):
    folder = build_pixart(tmp_path / "sizes", network={"use_additional_conditions": True})
    with pytest.raises(ValueError, match="told resolution and aspect ratio"):
        load_teacher(str(folder))


def test_encoder_is_the_pipelines(teacher, pipe):
    """Prompts of several lengths: what of the 300 tokens counts is in the mask."""
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, mask, empty, empty_mask = pipe.encode_prompt(PROMPTS, device=CPU)
    assert set(found.tensors) == set(found.null) == {"text", "mask"}
    assert_close(found.tensors["text"], text, atol=1e-5, rtol=0)
    assert_close(found.unconditional().tensors["text"], empty, atol=1e-5, rtol=0)
    assert torch.equal(found.tensors["mask"], mask) and len(mask.sum(1).unique()) == 2
    assert torch.equal(found.unconditional().tensors["mask"], empty_mask)


def test_conditions_of_a_plan_are_the_encoders(teacher, pipe):
    told = {name: tuple(value.shape[1:]) for name, value in teacher.encode(PROMPTS).tensors.items()}
    assert teacher.denoiser.backbone.conditions(pipe.tokenizer.model_max_length) == told


def test_taps_are_the_pictures_tokens(teacher):
    taps = teacher.denoiser.backbone.taps
    x, t = torch.randn(2, *LATENTS), torch.full((2,), 0.5)
    found = teacher.denoiser(x, t, teacher.encode(PROMPTS), taps=taps).taps
    assert taps[-1] == "transformer_blocks.1"
    assert {found[name].shape for name in taps} == {(2, 4, 24)}


def test_lora_file_is_refused_as_its_pipeline_loads_none(teacher, pipe, tmp_path):
    with pytest.raises(ValueError, match="a PixArtSigmaPipeline reads no LoRA files"):
        write_adapter(pipe, teacher, {}, LoRA(rank=2, alpha=2.0), "transformer", tmp_path / "lora", "lora")
    assert not (tmp_path / "lora").exists()
