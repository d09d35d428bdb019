"""A Sana pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, SanaPipeline
from torch import nn
from torch.testing import assert_close

from fewstep.models.adapters import LoRA, add_lora
from fewstep.sampling import sample_teacher
from fewstep.teachers.pipelines import load_teacher
from tests.tiny_pipeline import LATENTS, build_sana

PROMPTS = ["a photo of a bag", "an ankle boot, black and white"]
CPU = torch.device("cpu")
SIDE = 32
DPM = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_sana(tmp_path_factory.mktemp("sana") / "pipeline", shift=3.0)


@pytest.fixture(scope="module")
def pipe(folder):
    made = SanaPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder))


def pictures(pipe, prompt, side=SIDE, **call):
    generator = torch.Generator("cpu").manual_seed(5)
    size = {"height": side, "width": side, "use_resolution_binning": False}
    return 2 * pipe(prompt, generator=generator, output_type="pt", **size, **call).images - 1


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (LATENTS, "flow", "euler")
    assert (teacher.guidance, teacher.folder) == (4.5, folder)


@pytest.mark.parametrize(("steps", "guidance", "resolution"), [(10, 2.5, None), (3, 1.0, None), (4, 2.0, 64)])
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, resolution):
    """Images, < 1e-4.  Fails without the mask, or if the empty prompt stands behind the instruction, too."""
    teacher = load_teacher(str(folder), **({} if resolution is None else {"resolution": resolution}))
    for prompt in PROMPTS:
        ours = sample_teacher(teacher, 1, [prompt], 5, num_steps=steps, guidance=guidance)
        made = pictures(pipe, prompt, resolution or SIDE, num_inference_steps=steps, guidance_scale=guidance)
        assert_close(ours, made, atol=1e-4, rtol=0)
        assert made.std() > 0.04


def test_negative_prompt_is_encoded_without_the_instruction(teacher, pipe):
    ours = sample_teacher(teacher.against("a coat"), 1, PROMPTS, 5, num_steps=3, guidance=2.0)
    made = pictures(pipe, PROMPTS[0], num_inference_steps=3, guidance_scale=2.0, negative_prompt="a coat")
    assert_close(ours, made, atol=1e-4, rtol=0)
    assert_close(teacher.encode([""]).null["text"], teacher.against("").encode(["a coat"]).null["text"])


def test_prompt_and_empty_prompt_are_told_apart(teacher):
    """An empty prompt that is asked for has the instruction; the one that guidance leads away from has not."""
    found = teacher.encode(["", PROMPTS[0]])
    assert (found.tensors["text"][:1] - found.null["text"]).abs().max() > 1e-2
    assert found.tensors["mask"].sum(1).tolist() != found.null["mask"].sum(1).tolist() * 2


def test_levels_are_the_published_schedulers(tmp_path):
    """DPM-Solver++ on flow's levels, shifted by 3, begins just below 1 and ends in data."""
    scheduler = DPMSolverMultistepScheduler(**DPM)
    teacher = load_teacher(str(build_sana(tmp_path / "dpm", scheduler=scheduler)))
    scheduler.set_timesteps(4)
    assert_close(teacher.grid(4), scheduler.sigmas, atol=1e-6, rtol=0)
    assert 0.999 < teacher.grid(4)[0] < 1 and teacher.grid(4)[-1] == 0


def test_first_order_of_the_published_solver_is_euler_but_for_whole_timesteps(tmp_path):
    """Its network is told int(1000 t); with a network that hears no time the pictures are equal, < 1e-4."""
    folder = build_sana(tmp_path / "first", scheduler=DPMSolverMultistepScheduler(**DPM, solver_order=1))
    teacher, pipe = load_teacher(str(folder)), SanaPipeline.from_pretrained(folder)
    for network in (teacher.denoiser.backbone.module, pipe.transformer):
        nn.init.zeros_(network.time_embed.emb.timestep_embedder.linear_1.weight)
    pipe.set_progress_bar_config(disable=True)
    made = pictures(pipe, PROMPTS[0], num_inference_steps=5, guidance_scale=2.0)
    assert_close(sample_teacher(teacher, 1, PROMPTS, 5, num_steps=5, guidance=2.0), made, atol=1e-4, rtol=0)


def test_scheduler_without_flows_levels_is_refused(tmp_path):
    folder = build_sana(tmp_path / "ddim", scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="DDIMScheduler must have flow's levels"):
        load_teacher(str(folder))


def test_size_that_its_pipeline_does_not_make_is_refused(folder):
    """A VAE of eight pixels a latent could."""
    with pytest.raises(ValueError, match="resolution 40 is not a multiple of this network's 32 pixels; take 32"):
        load_teacher(str(folder), resolution=40)


def test_encoder_is_the_pipelines(teacher, pipe):
    found = teacher.encode(PROMPTS)
    assert set(found.tensors) == set(found.null) == {"text", "mask"}
    default = SanaPipeline.__call__.__wrapped__.__defaults__
    instruction = next(value for value in default if isinstance(value, list) and len(value) > 2)
    with torch.no_grad():
        text, mask, empty, empty_mask = pipe.encode_prompt(PROMPTS, device=CPU, complex_human_instruction=instruction)
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
    assert {found[name].shape for name in taps} == {(2, 16, 32)}


def test_latents_and_pictures_are_each_others(teacher, pipe):
    """The way back undoes the VAE's scale, up to the VAE itself."""
    x = torch.randn(2, *LATENTS)
    with torch.no_grad():
        raw = pipe.vae.encode(teacher.codec.render(x)).latent
        decoded = pipe.vae.decode(x / 0.7, return_dict=False)[0]
    assert_close(teacher.codec.encode(teacher.codec.render(x)), raw * 0.7, atol=1e-5, rtol=0)
    assert_close(teacher.codec.decode(x), decoded.clamp(-1, 1), atol=1e-5, rtol=0)
    assert teacher.codec.image_shape(LATENTS) == (3, SIDE, SIDE)
    assert [feature.shape[-1] for feature in teacher.codec.features(decoded)] == [16, 8, 4, 4]


def test_depthwise_layers_get_no_adapter(folder):
    """Fails in peft if they do: it has adapters of grouped convolutions of few ranks only, and cannot merge them."""
    network = load_teacher(str(folder)).denoiser.backbone.module
    grouped = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    add_lora(network, LoRA(rank=2, alpha=2.0))
    adapted = {name.split(".lora_")[0] for name, _ in network.named_parameters() if ".lora_" in name}
    assert grouped and not adapted & set(grouped)
    assert "transformer_blocks.0.ff.conv_point" in adapted
