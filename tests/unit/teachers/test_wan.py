"""A Wan pipeline as a teacher does what the pipeline does.  It is tiny and untrained."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline
from torch.testing import assert_close

from fewstep.config import resolve
from fewstep.diffusion import RectifiedFlow, student_grid
from fewstep.export_adapter import write_adapter
from fewstep.models.adapters import LoRA
from fewstep.models.discriminator import Head
from fewstep.models.trio import Trio
from fewstep.planning.plan import plan
from fewstep.sampling import sample_teacher
from fewstep.teachers.flow import curved, curved_scheduler
from fewstep.teachers.pipelines import load_teacher
from fewstep.teachers.wan import filmstrip
from fewstep.training.launch import _cannot_leave
from tests.tiny_pipeline import FILM, build_wan

PROMPTS = ["a photo of a bag", "an ankle boot, &lt;b&gt;  black and white "]
TINY = {"height": 16, "width": 16, "frames": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("wan") / "pipeline", shift=3.0)


@pytest.fixture(scope="module")
def pipe(folder):
    made = WanPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(str(folder), **TINY)


def test_folder_loads_as_a_teacher_of_its_shape(teacher, folder):
    assert (teacher.shape, teacher.denoiser.predicts, teacher.solver) == (FILM, "flow", "euler")
    assert (teacher.guidance, teacher.folder, teacher.options) == (5.0, folder, TINY)
    assert load_teacher(str(folder)).shape == (4, 21, 120, 208)  # the VAE in miniature halves twice


@pytest.mark.parametrize(
    ("steps", "guidance", "size"), [(6, 2.5, (16, 16, 5)), (3, 1.0, (32, 16, 1)), (3, 2.0, (16, 32, 9))]
)
def test_teacher_samples_what_its_pipeline_samples(folder, pipe, steps, guidance, size):
    """Frames, < 1e-4.  Fails with times before the shift, without the latents' moments, with text of other length."""
    height, width, frames = size
    teacher = load_teacher(str(folder), height=height, width=width, frames=frames)
    ours = sample_teacher(teacher, 2, PROMPTS, 5, num_steps=steps, guidance=guidance)
    assert ours.shape[1:] == teacher.codec.image_shape(teacher.shape)
    call = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt"}
    for i, prompt in enumerate(PROMPTS):
        generator = torch.Generator("cpu").manual_seed(5 + i)
        made = pipe(prompt, generator=generator, height=height, width=width, num_frames=frames, **call).frames
        assert_close(ours[i : i + 1], 2 * filmstrip(made.transpose(1, 2)) - 1, atol=1e-4, rtol=0)
        assert made.std() > 0.02


def test_filmstrip_is_of_five_frames_from_first_to_last():
    video = torch.arange(81.0).view(1, 1, 81, 1, 1)
    assert filmstrip(video).flatten().tolist() == [0, 20, 40, 60, 80]
    assert filmstrip(video[:, :, :1]).shape == (1, 1, 1, 1)


def test_encoder_is_the_pipelines(teacher, pipe):
    """Cleaned, padded to 512 with zeros.  Fails with encode_prompt's own 226."""
    found = teacher.encode(PROMPTS)
    with torch.no_grad():
        text, empty = pipe.encode_prompt(PROMPTS, max_sequence_length=512, device=torch.device("cpu"))
    assert_close(found.tensors["text"], text, atol=1e-5, rtol=0)
    assert_close(found.unconditional().tensors["text"], empty, atol=1e-5, rtol=0)
    assert teacher.denoiser.backbone.conditions(16) == {"text": tuple(text.shape[1:])} == {"text": (512, 16)}


def test_taps_are_the_blocks_tokens_at_their_places(teacher):
    """Frame by frame, row by row.  Fails if places and channels are mixed up."""
    network, cond = teacher.denoiser, teacher.encode(PROMPTS)
    seen = []
    handle = network.backbone.module.blocks[-1].register_forward_hook(lambda *got: seen.append(got[-1]))
    x, t = torch.randn(2, 4, 3, 4, 8), torch.full((2,), 0.5)
    feature = network(x, t, cond, taps=network.backbone.taps).taps["blocks.1"]
    handle.remove()
    assert network.backbone.taps == ("blocks.1",) and feature.shape == (2, 24, 3, 2, 4)
    assert torch.equal(feature[1, :, 2, 1, 3], seen[0][1, -1]) and torch.equal(feature[0, :, 1, 0, 2], seen[0][0, 10])


def test_a_gan_judges_every_frame(teacher):
    network, cond = teacher.denoiser, teacher.encode(PROMPTS)
    head = Head.probe(network, (4, 3, 4, 8), teacher.encode(PROMPTS[:1]), network.backbone.taps, 0)
    x, t = torch.randn(2, 4, 3, 4, 8), torch.full((2,), 0.5)
    features = network(x, t, cond, taps=head.taps).taps
    logits = head(features)
    assert logits.shape == (2, 3)
    assert_close(logits[1:, 2:], head({name: value[1:, :, 2] for name, value in features.items()}))


def test_times_are_those_of_unipc(tmp_path):
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    teacher = load_teacher(str(build_wan(tmp_path / "unipc", scheduler=scheduler)), **TINY)
    scheduler.set_timesteps(5)
    assert_close(teacher.grid(5), scheduler.sigmas)
    assert teacher.grid(5)[0] == pytest.approx(1, abs=2e-6) and teacher.grid(5)[-1] == 0


def test_scheduler_without_flows_levels_is_refused(tmp_path):
    folder = build_wan(tmp_path / "betas", scheduler=UniPCMultistepScheduler())
    with pytest.raises(ValueError, match="UniPCMultistepScheduler must have flow's levels"):
        load_teacher(str(folder), **TINY)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ({"height": 481}, "height 481 is not a multiple of this network's 16 pixels; take 480"),
        ({"width": 7}, "width 7 is not a multiple of this network's 16 pixels; take 16"),
        ({"frames": 80}, "frames 80 is not a multiple of 4 and one more; take 81"),
        ({"frames": 0}, "frames 0 is not a multiple of 4 and one more; take 1"),
    ],
)
def test_other_sizes_are_refused_with_the_nearest(folder, size, said):
    with pytest.raises(ValueError, match=said):
        load_teacher(str(folder), **size)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_scheduler_of_a_student_begins_and_ends_where_it_does(steps, shift):
    """Rounding a student's times to thousandths is all that is between them: half a one at each of its three knots."""
    levels = student_grid(RectifiedFlow(), steps, shift=shift)
    found = curved(levels)
    assert_close(found, levels, atol=2e-6 if steps < 4 else 1e-3, rtol=0)
    assert_close(found[[0, -1]], levels[[0, -1]], atol=1e-6, rtol=0)


def test_levels_that_are_only_shifted_are_met_exactly():
    even = 1 - torch.arange(8, dtype=torch.float64) / 8
    levels = (8 * even / (1 + 7 * even)).float()
    assert_close(curved(levels), levels, atol=2e-6, rtol=0)


def test_student_that_begins_elsewhere_is_refused():
    with pytest.raises(ValueError, match=r"begins at time 1, and the student at 0.8"):
        curved_scheduler(torch.tensor([0.8, 0.5]), False)


def test_that_a_student_cannot_be_exported_is_said_before_it_is_trained(teacher):
    for sets, said in (({}, "begins at time 1, and the student at 0.714"), ({"init_sigma": None}, "")):
        config = resolve(given={"teacher": {"name": "mixture"}, "method": {"name": "sid", "num_steps": 1, **sets}})
        found = _cannot_leave(config, teacher)
        assert said in found and bool(said) == bool(found)


def test_stills_and_their_latents_are_each_others(folder):
    """The way back undoes the moments, up to the VAE itself; pictures are no videos of several frames."""
    stills = load_teacher(str(folder), **(TINY | {"frames": 1})).codec
    images = stills.render(torch.randn(2, 4, 1, 4, 4))
    with torch.no_grad():
        raw = stills._vae.encode(images[:, :, None]).latent_dist.mode()
    mean, std = (torch.tensor(each).view(1, 4, 1, 1, 1) for each in ([0.1, -0.2, 0.3, 0.0], [0.7, 1.5, 1.0, 2.0]))
    assert_close(stills.encode(images), (raw - mean) / std, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no video of 5 frames"):
        load_teacher(str(folder), **TINY).codec.encode(images)


def test_half_precision_leaves_tables_in_float32(folder):
    """Fails if the network's dtype is that of its first parameter."""
    teacher = load_teacher(str(folder), dtype="bf16", **TINY)
    module = teacher.denoiser.backbone.module
    assert (module.scale_shift_table.dtype, teacher.denoiser.backbone.dtype) == (torch.float32, torch.bfloat16)
    with torch.no_grad():
        made = teacher.denoiser(torch.randn(1, *FILM), torch.ones(1), teacher.encode(PROMPTS[:1]))
    assert made.x0.isfinite().all()


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return build_wan(tmp_path_factory.mktemp("wan") / "two", boundary=0.875, shift=3.0)


def test_teacher_of_two_networks_samples_what_its_pipeline_samples(two):
    """Frames, < 1e-4, of steps on both sides of the boundary.  Fails if one network makes them all."""
    pipe, teacher = WanPipeline.from_pretrained(two), load_teacher(str(two), **TINY)
    pipe.set_progress_bar_config(disable=True)
    grid = teacher.grid(6)
    assert (grid > 0.875).sum() > 1 and (grid[:-1] < 0.875).sum() > 1
    ours = sample_teacher(teacher, 1, PROMPTS, 5, num_steps=6, guidance=2.5)
    call = {"num_inference_steps": 6, "guidance_scale": 2.5, "height": 16, "width": 16, "num_frames": 5}
    made = pipe(PROMPTS[0], generator=torch.Generator("cpu").manual_seed(5), output_type="pt", **call).frames
    assert_close(ours, 2 * filmstrip(made.transpose(1, 2)) - 1, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("time", "part"), [(1.0, "transformer"), (0.875, "transformer"), (0.8749, "transformer_2")])
def test_boundary_is_the_first_networks(two, time, part):
    """As the pipeline has it, and in a batch of both."""
    pipe, teacher = WanPipeline.from_pretrained(two), load_teacher(str(two), **TINY)
    cond, x, t = teacher.encode(PROMPTS), torch.randn(2, *FILM), torch.tensor([time, 0.3])
    with torch.no_grad():
        told = {"timestep": t[:1] * 1000, "encoder_hidden_states": cond.tensors["text"][:1]}
        theirs = getattr(pipe, part)(hidden_states=x[:1], return_dict=False, **told)[0]
        assert_close(teacher.denoiser(x, t, cond).raw[:1], theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("expert", "part"), [(None, "transformer_2"), ("low", "transformer_2"), ("high", "transformer")]
)
def test_student_of_two_networks_starts_from_the_named_one(two, expert, part):
    """And shares its weights with the teacher where it is an adapter."""
    named = {} if expert is None else {"expert": expert}
    teacher = load_teacher(str(two), **TINY, **named)
    trio = Trio.build(teacher.denoiser, frozenset({"fake_score"}), sharing="lora", init=teacher.student)
    weight = getattr(WanPipeline.from_pretrained(two), part).patch_embedding.weight
    for role in (trio.generator, trio.critic()):
        plain = dict(role.backbone.module.named_parameters())["patch_embedding.weight"]
        assert torch.equal(plain, weight)
        assert any(p is plain for p in trio.real_score.parameters())


def test_expert_of_one_network_and_unknown_experts_are_refused(folder, two):
    with pytest.raises(ValueError, match="has one network, so expert='low' has no effect"):
        load_teacher(str(folder), **TINY, expert="low")
    with pytest.raises(ValueError, match=r"teacher.expert='mid': allowed are high, low"):
        load_teacher(str(two), **TINY, expert="mid")


def test_lora_file_of_a_student_of_two_networks_is_refused(two, tmp_path):
    """Beside both of them it would be another student."""
    teacher = load_teacher(str(two), **TINY)
    with pytest.raises(ValueError, match=r"starts from one of the networks .* export it as a pipeline"):
        write_adapter(WanPipeline.from_pretrained(two), teacher, {}, LoRA(), "transformer", tmp_path / "lora", "lora")


def test_plan_of_two_networks_holds_both(two):
    """And one of them for the student."""
    train = {"batch_size": 1, "accumulate": 1, "gradient_checkpointing": True}
    given = {"teacher": {"name": str(two), **TINY}, "method": {"name": "dmd2", "num_steps": 2}, "train": train}
    made = plan(resolve(given=given))
    one = sum(p.numel() for p in WanPipeline.from_pretrained(two).transformer.parameters())
    assert made.parameters["teacher"] == 2 * one and made.trained["generator"] == one
