"""Claims about the build of fashion-unet and about the cards of both embedded teachers; no data set needed."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch.testing import assert_close

from fewstep.teachers.fashion_build import card, unet
from fewstep.teachers.fashion_build.__main__ import DEFAULT_OUT
from fewstep.teachers.fashion_build.card import Cell
from fewstep.teachers.fashion_build.model_card import render_card

FOLDER = DEFAULT_OUT / "fashion-dit"
needs_weights = pytest.mark.skipif(not (FOLDER / "model_index.json").is_file(), reason="the weights are not built yet")
STEPS = 3


def build(out, work, *, kill_at=None):
    """The stage on 20 random latents, three small steps, each with a restart point; stopped in a call of the loss."""
    latents = torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    loss, calls = unet.epsilon_loss, []

    def counted(*inputs):
        calls.append(1)
        if len(calls) == kill_at:
            raise KeyboardInterrupt
        return loss(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet, "precompute", lambda *_: (latents, torch.arange(20) % 10))
        patch.setattr(unet, "UNET_PLAN", replace(unet.UNET_PLAN, steps=STEPS, save_every=0.0))
        patch.setattr(unet, "BATCH", 3)
        patch.setattr(unet, "epsilon_loss", counted)
        unet.build_unet(out, out, work)


def weights_without_unet(folder):
    """A copy of the shipped weights as they are before the stage."""
    for name in ("fashion-dit", "fashion-classifier"):
        shutil.copytree(DEFAULT_OUT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of weights after an unbroken stage.  Tests must leave it as it is."""
    out = weights_without_unet(tmp_path_factory.mktemp("weights"))
    build(out, tmp_path_factory.mktemp("work"))
    return out


@pytest.fixture(scope="module")
def lively(built, tmp_path_factory):
    """The pipeline folder with a UNet of random weights: after three steps the stage's still predicts about zero."""
    folder = tmp_path_factory.mktemp("lively") / "fashion-unet"
    shutil.copytree(built / "fashion-unet", folder)
    network = unet.new_unet(4, 64)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.half().save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def pipeline(lively):
    return unet.load_pipeline(lively)


def test_an_untrained_unet_predicts_zero():
    """The last convolution starts at zero, so training starts at the loss of the best constant."""
    network = unet.new_unet(3, 5)
    x_t, text = torch.randn(2, 3, 8, 8), torch.randn(2, 16, 5)
    assert not network(x_t, torch.tensor([0, 999]), text, return_dict=False)[0].any()


def test_untrained_blocks_pass_their_input_on():
    """Residual and attention blocks start as the identity."""
    network = unet.new_unet(3, 5)
    x, time, text = torch.randn(2, 96, 4, 4), torch.randn(2, 256), torch.randn(2, 16, 5)
    assert torch.equal(network.mid_block(x, time, encoder_hidden_states=text), x)


@pytest.mark.parametrize("steps", [1, 4, 10, 25, 50])
def test_every_grid_starts_at_999(steps):
    """A one-step student starts where the teacher's grid does, whatever the number of steps."""
    scheduler = unet.new_scheduler()
    scheduler.set_timesteps(steps)
    assert len(scheduler.timesteps) == steps and int(scheduler.timesteps[0]) == 999


def test_the_schedule_is_stable_diffusions():
    """sqrt(a_999) = 0.0683 (0.00466 squared) is the figure known of Stable Diffusion's betas [arXiv:2305.08891]."""
    signal = unet.new_scheduler().alphas_cumprod
    assert_close(signal[0].double(), torch.tensor(1 - 0.00085).double(), atol=1e-7, rtol=0)
    assert_close(signal[999].sqrt(), torch.tensor(0.068265), atol=1e-5, rtol=0)


def test_epsilon_loss_is_zero_for_the_true_noise():
    """The network sees sqrt(a) x0 + sqrt(1 - a) eps and the whole timestep; batch = width on purpose."""
    x0, eps = torch.randn(2, 8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.arange(8) * 142
    signal = unet.new_scheduler().alphas_cumprod

    def oracle(x_t, timestep, text, return_dict):
        assert torch.equal(timestep, t)
        assert_close(x_t[3], signal[426].sqrt() * x0[3] + (1 - signal[426]).sqrt() * eps[3])
        return (eps,)

    assert float(unet.epsilon_loss(oracle, x0, torch.zeros(8, 16, 4), eps, t, signal)) == 0


def test_an_error_of_one_costs_its_capped_snr():
    """min(SNR, 5) / SNR: 1 at SNR 1/4 and 5, 1/2 at SNR 10."""
    signal = torch.tensor([10 / 11, 5 / 6, 1 / 5])
    eps = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    costs = [
        float(unet.epsilon_loss(lambda *_, return_dict: (eps + 1,), eps, eps, eps, torch.tensor([t]), signal))
        for t in range(3)
    ]
    assert_close(costs, [0.5, 1.0, 1.0], atol=1e-5, rtol=0)


@needs_weights
def test_the_stage_stores_a_stable_diffusion_pipeline(built):
    """diffusers loads the folder by itself, in fp32 and without a safety checker, and its pictures are 32x32."""
    loaded = StableDiffusionPipeline.from_pretrained(built / "fashion-unet", local_files_only=True)
    assert loaded.safety_checker is None and loaded.unet.dtype == torch.float32
    assert loaded("a bag", num_inference_steps=1).images[0].size == (32, 32)


@needs_weights
def test_the_folder_shares_all_but_the_unet_with_fashion_dit(built):
    """Tokenizer, text encoder and VAE are byte for byte the same, and so are their notes."""
    for part in ("tokenizer", "text_encoder", "vae"):
        for path in (FOLDER / part).iterdir():
            assert (built / "fashion-unet" / part / path.name).read_bytes() == path.read_bytes()
    notes = [json.loads((built / name / "build.json").read_text()) for name in ("fashion-dit", "fashion-unet")]
    assert notes[1]["unet"]["steps"] == STEPS
    assert [notes[1][stage] for stage in ("text", "vae")] == [notes[0][stage] for stage in ("text", "vae")]
    assert "unet" not in notes[0]


@needs_weights
def test_a_stopped_stage_ends_where_an_unbroken_one_does(built, tmp_path):
    """Killed in its second step and started again, the stage stores the same UNet, bit for bit."""
    out = weights_without_unet(tmp_path / "weights")
    with pytest.raises(KeyboardInterrupt):
        build(out, tmp_path / "work", kill_at=4)
    build(out, tmp_path / "work")
    path = "fashion-unet/unet/diffusion_pytorch_model.safetensors"
    whole, again = load_file(built / path), load_file(out / path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


@needs_weights
def test_a_finished_stage_is_skipped(built, tmp_path):
    """Another run trains nothing: it would leave restart points."""
    build(built, tmp_path)
    assert not list(tmp_path.iterdir())


@needs_weights
def test_the_stage_wants_the_parts_that_it_copies(tmp_path):
    """Without fashion-dit's VAE there is nothing to train on, and the message says what to run."""
    with pytest.raises(FileNotFoundError, match="text encoder and VAE"):
        build(tmp_path, tmp_path)


@needs_weights
def test_the_unet_is_conditioned_on_the_last_hidden_state(pipeline):
    """StableDiffusionPipeline reads another layer than fashion-dit's pipeline, after the final norm."""
    ids = pipeline.tokenizer(["bag"], padding="max_length", return_tensors="pt").input_ids
    wanted = pipeline.text_encoder(ids).last_hidden_state
    assert_close(unet.encode_for_unet(pipeline, ["bag"]), wanted)


@needs_weights
def test_pictures_belong_to_the_sample_and_not_to_the_chunk(pipeline):
    """Samples 2 and 3 are the same pictures wherever their chunk starts; 1e-5 is the batch size's rounding."""
    draw, cell = unet.pipeline_draw(pipeline), Cell(steps=2, cfg=2.0, n=4, seed=9)
    assert_close(draw(cell, 0, 4)[2:], draw(cell, 2, 2), atol=1e-5, rtol=0)


@needs_weights
@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (4, 2.0)])
def test_the_cards_sampler_equals_the_pipeline(lively, pipeline, steps, guidance):
    """The card samples as the package does; diffusers' own pipeline makes the same pictures from the same seeds."""
    cell = Cell(steps=steps, cfg=guidance, n=5, seed=9)
    theirs = unet.pipeline_draw(pipeline)(cell, 3, 2).clamp(-1, 1)
    ours = card.draw_of_teacher(lively)(cell, 3, 2)
    assert float((theirs[0] - theirs[1]).abs().max()) > 0.1
    assert_close(ours, theirs, atol=1e-4, rtol=0)


@needs_weights
def test_a_stored_card_is_what_its_report_renders_to():
    """README.md of fashion-dit follows from teacher.json and the notes alone."""
    report = json.loads((FOLDER / "teacher.json").read_text(encoding="utf-8"))
    assert render_card(report, DEFAULT_OUT) == (FOLDER / "README.md").read_text(encoding="utf-8")


def fake_figures(monkeypatch, order, *, stop_after):
    """Measure by formula, note whose turn it was, and stop like a crash after some cells."""

    def measure(draw, suite, cell, *, workers):
        if len(order) == stop_after:
            raise KeyboardInterrupt
        order.append((draw, cell.steps, cell.cfg, cell.n))
        return {**vars(cell), "fmd": cell.cfg, "agreement": 0.5, "seconds": 1.0}

    subjects = tuple(replace(subject, opened=lambda folder: folder.name) for subject in card.SUBJECTS)
    monkeypatch.setattr(card, "SUBJECTS", subjects)
    monkeypatch.setattr(card, "measure", measure)
    monkeypatch.setattr(card, "suite_of", lambda out: None)


@needs_weights
def test_teachers_are_measured_in_turn_and_go_on_after_a_crash(built, tmp_path, monkeypatch):
    """One cell of each, stored at once; the next run starts with the cells that are missing."""
    shutil.copytree(built, tmp_path / "out")
    (tmp_path / "out" / "fashion-dit" / "teacher.json").unlink()
    for expected in ((1.5, 2.0), (1.0, 1.0)):
        order = []
        with monkeypatch.context() as patch:
            fake_figures(patch, order, stop_after=4)
            with pytest.raises(KeyboardInterrupt):
                card.build_card(tmp_path, tmp_path / "out", tmp_path)
        assert [name for name, *_ in order] == ["fashion-dit", "fashion-unet"] * 2
        assert tuple(cfg for name, _, cfg, _ in order if name == "fashion-unet") == expected
    text = (tmp_path / "out" / "fashion-unet" / "README.md").read_text(encoding="utf-8")
    assert "| teacher | 50 | 1 | 10,000 | 1000000 | 1.000 | 0.500 |" in text and "| UNet | 2,491,172 |" in text


@needs_weights
def test_a_half_trained_teacher_is_not_measured(built, tmp_path, monkeypatch):
    """Snapshots of a running stage lie in the folder, but figures are about finished weights."""
    shutil.copytree(built, tmp_path / "out")
    notes = tmp_path / "out" / "fashion-unet" / "build.json"
    notes.write_text(json.dumps({k: v for k, v in json.loads(notes.read_text()).items() if k != "unet"}))
    order = []
    fake_figures(monkeypatch, order, stop_after=0)
    (tmp_path / "out" / "fashion-dit" / "teacher.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        card.build_card(tmp_path, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out" / "fashion-unet" / "teacher.json").exists()
